"""Saves a view of a Weights & Biases project in which curves, heat maps and tables of its runs are found at a glance.

    python -m predictor.wandb_workspace OWNER                  # project switchcast; needs an account: wandb login
    python -m predictor.wandb_workspace OWNER --project mine

The view holds for all runs of the project: those of `train.py`, and those of `runtime.infer --wandb true`. It needs
`pip install "switchcast[workspace]"`.
"""

from importlib import import_module
from typing import Any

from data.cli import from_command_line, user_errors

WIDTH, HEIGHT = 24, 8
"""Of a row of panels, in W&B's units."""
CURVES = {
    "Is it learning?": ["val/load_tv", "val/token_top1", "train/load_loss", "train/token_loss", "train/gradient_norm",
                        "lr-AdamW"],
    "While it serves": ["load_tv", "exposed_ms", "compute_ms", "forecast_ms", "plan_ms", "fallbacks"],
}  # fmt: skip
"""Sections of line plots, each with the keys that it shows."""
LAYERS = {
    "Layer by layer": ["layers/val/load_tv/.*"],
    "While it serves, layer by layer": [".*/balancedness", ".*/moves"],
}
"""Sections of line plots with a line for each layer: patterns of keys."""
PICTURES = {
    "How good are the forecasts?": ["pictures/ladder", "pictures/calibration"],
    "Expert load: forecast beside what came": [
        f"pictures/heat_{stream}" for stream in ("steady", "drift", "every_10", "every_1", "unseen", "text")
    ],
}
"""Sections of pictures."""
TABLES = ("tables/ladder", "tables/layers")


def workspace(owner: str, project: str) -> Any:
    """The view, as `wandb_workspaces` describes it; nothing is sent.

    Raises:
        ValueError: If that package is not installed.
    """
    try:  # its type information names few of its classes
        panels: Any = import_module("wandb_workspaces.reports.v2")
        workspaces: Any = import_module("wandb_workspaces.workspaces")
    except ImportError:
        raise ValueError("a view needs wandb-workspaces; pip install 'switchcast[workspace]'") from None

    def places(count: int, columns: int) -> list[Any]:
        width = WIDTH // columns
        return [
            panels.Layout(x=number % columns * width, y=number // columns * HEIGHT, w=width, h=HEIGHT)
            for number in range(count)
        ]

    def section(name: str, made: list[Any]) -> Any:
        return workspaces.Section(name=name, panels=made, is_open=True)

    curves = [
        section(name, [panels.LinePlot(y=[key], title=key, layout=at) for key, at in zip(keys, places(len(keys), 3),
                                                                                         strict=True)])
        for name, keys in CURVES.items()
    ]  # fmt: skip
    layers = [
        section(name, [panels.LinePlot(metric_regex=keys, title=keys, layout=at)
                       for keys, at in zip(patterns, places(len(patterns), 2), strict=True)])
        for name, patterns in LAYERS.items()
    ]  # fmt: skip
    pictures = [
        section(name, [panels.MediaBrowser(media_keys=[key], num_columns=1, title=key.partition("/")[2], layout=at)
                       for key, at in zip(keys, places(len(keys), 2), strict=True)])
        for name, keys in PICTURES.items()
    ]  # fmt: skip
    tables = section("Tables", [panels.WeavePanelSummaryTable(table_name=name, layout=at)
                                for name, at in zip(TABLES, places(len(TABLES), 1), strict=True)])  # fmt: skip
    learning, serving = curves
    ordered = [learning, *pictures, layers[0], tables, serving, layers[1]]
    return workspaces.Workspace(entity=owner, project=project, name="Switchcast at a glance", sections=ordered)


def save(owner: str, project: str = "switchcast") -> None:
    """Saves the view and prints its address.

    Args:
        owner: User or team of Weights & Biases that the project belongs to.
        project: The project.
    """
    import wandb

    view = workspace(owner, project)
    try:
        view.save()
    except (wandb.Error, wandb.errors.UsageError, ValueError) as error:
        raise ValueError(
            f"the view cannot be saved in {owner}/{project} ({error}); log in with `wandb login`"
        ) from None
    print(view.url)


def main() -> None:
    """Command line of `save`."""
    with user_errors():
        from_command_line(save)


if __name__ == "__main__":
    main()
