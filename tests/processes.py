"""Two processes that work together."""

import torch.multiprocessing as mp


def on_two_processes(worker, *args):
    """What the processes put into their queue.

    Args:
        worker: called as worker(rank, *args, queue) in each.
    """
    # Forked from one that has imported, so that the imports, which take the time, are made once
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["open_clip", "torch.distributed"])
    queue = context.Queue()
    processes = [context.Process(target=worker, args=(rank, *args, queue)) for rank in range(2)]
    for p in processes:
        p.start()
    results = queue.get(timeout=300)
    for p in processes:
        p.join(60)
        assert p.exitcode == 0
    return results
