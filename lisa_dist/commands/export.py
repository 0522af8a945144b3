"""``lisa-dist export``: a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

from lisa_dist.checkpoint.export import export_checkpoint, find_checkpoint
from lisa_dist.config import EXIT_DONE, Config
from lisa_dist.config.paths import followed
from lisa_dist.config.run_directory import RunDirectory


def run(config: Config) -> int:
    """Export the checkpoint of ``run.dir`` that ``export.step`` names, or the newest, to ``export.path``.

    Raises:
        UserError: there is nothing to export, or it can't be written.
    """
    target = followed(str(config.export.path))
    checkpoint = find_checkpoint(RunDirectory.of(config).checkpoints, config.export.step)
    files = export_checkpoint(config, checkpoint, target)
    print(f"{target}: {len(files)} file{'s' if len(files) > 1 else ''} of weights from {checkpoint}")
    return EXIT_DONE
