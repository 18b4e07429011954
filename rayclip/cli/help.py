"""Help pages: options in groups, as wide as the terminal, summaries whole.

Plain text without markup: it starts fast, can be searched, and prints brackets as they are.
"""

from typing import Any

from typer.core import TyperCommand, TyperGroup

WIDTH = {"max_content_width": 160}

_GROUPS = {
    "Model and data": "method methods model origin target a data test shots limit captions class_names resolution "
    "resize seed",
    "Attack": "attacks attack eps steps step_size norm start eps_warmup substitutes precision compiled",
    "Defence and scoring": "defense aim draws scorer made_against",
    "Optimiser": "recipe epochs lr batch_size accumulate optimizer momentum betas weight_decay schedule warmup_steps "
    "ema trains",
    "Cluster": "cluster workers min_workers gpus_per_worker data_workers shard_size",
    "Tracking": "tracking_uri no_tracking experiment",
    "Output": "out models json quiet json_logs verbose save_every_steps help",
}
_GROUP_OF = {name: group for group, names in _GROUPS.items() for name in names.split()}


class Command(TyperCommand):
    """A command whose options are listed by group; those that only it has come first."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        groups: dict[str, list[tuple[str, str]]] = {group: [] for group in ("Options", *_GROUPS)}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                group = getattr(param, "rich_help_panel", None) or _GROUP_OF.get(param.name or "", "Options")
                groups[group].append(record)
        for group, records in groups.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)


class Group(TyperGroup):
    """A group of commands, each with its whole summary."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        commands = [(name, command) for name in self.list_commands(ctx) if (command := self.get_command(ctx, name))]
        shown = [(name, command.get_short_help_str(1000)) for name, command in commands if not command.hidden]
        if shown:
            with formatter.section("Commands"):
                formatter.write_dl(shown)
