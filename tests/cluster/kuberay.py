"""`ray.io/v1` as KubeRay's API reference states it (docs.ray.io, "KubeRay CRD API reference", v1.6).

Pods within are Kubernetes' own affair and are checked against its published schema.
"""

from typing import Any


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object of these fields and no other: KubeRay's CRDs drop what they do not know without a word."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def words(*allowed: str) -> dict[str, Any]:
    return {"enum": list(allowed)}


ANY: dict[str, Any] = {}
TEXT = {"type": "string"}
FLAG = {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
NUMBER = {"type": "number", "minimum": 0}
TEXTS = {"type": "object", "additionalProperties": TEXT}
LIST = {"type": "array"}
POD = fields(("spec",), metadata=ANY, spec={"type": "object", "required": ["containers"]})
DELEGATE = words("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")

AUTH = fields(mode=words("disabled", "token"), enableK8sTokenAuth=FLAG, secretName=TEXT)
AUTOSCALER = fields(
    resources=fields(requests=ANY, limits=ANY, claims=LIST),
    image=TEXT,
    imagePullPolicy=words("Always", "IfNotPresent", "Never"),
    securityContext={"type": "object"},
    idleTimeoutSeconds=COUNT,
    upscalingMode=words("Default", "Aggressive", "Conservative"),
    version=words("v1", "v2"),
    env=LIST,
    envFrom=LIST,
    volumeMounts=LIST,
)
HEAD = fields(
    ("template",),
    template=POD,
    headService={"type": "object"},
    enableIngress=FLAG,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    serviceType=words("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
)
WORKERS = fields(
    ("groupName", "minReplicas", "maxReplicas", "template"),
    suspend=FLAG,
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    resources=TEXTS,
    labels=TEXTS,
    rayStartParams=TEXTS,
    template=POD,
    scaleStrategy=fields(workersToDelete=LIST),
    numOfHosts=COUNT,
)
CLUSTER = fields(
    ("headGroupSpec",),
    suspend=FLAG,
    managedBy=DELEGATE,
    authOptions=AUTH,
    autoscalerOptions=AUTOSCALER,
    headServiceAnnotations=TEXTS,
    enableInTreeAutoscaling=FLAG,
    gcsFaultToleranceOptions=fields(
        redisUsername=ANY, redisPassword=ANY, externalStorageNamespace=TEXT, redisAddress=TEXT
    ),
    headGroupSpec=HEAD,
    rayVersion=TEXT,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
JOB = fields(
    activeDeadlineSeconds=COUNT,
    backoffLimit=COUNT,
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=POD,
    metadata=TEXTS,
    clusterSelector=TEXTS,
    submitterConfig=fields(backoffLimit=COUNT),
    managedBy=DELEGATE,
    deletionStrategy={"type": "object"},
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    jobId=TEXT,
    submissionMode=words("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    entrypointResources=TEXT,
    entrypointNumCpus=NUMBER,
    entrypointNumGpus=NUMBER,
    ttlSecondsAfterFinished=COUNT,
    shutdownAfterJobFinishes=FLAG,
    suspend=FLAG,
)


def resource(kind: str) -> dict[str, Any]:
    spec = {"RayCluster": CLUSTER, "RayJob": JOB}[kind]
    head = {"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": {"type": "object"}}
    return fields(("apiVersion", "kind", "metadata", "spec"), **head, spec=spec)
