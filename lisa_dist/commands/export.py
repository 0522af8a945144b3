"""``lisa-dist export``: a checkpoint of a run as a Hugging Face directory."""

from __future__ import annotations

from lisa_dist.checkpoint.export import export_checkpoint, find_checkpoint
from lisa_dist.config import EXIT_DONE, Config, UserError
from lisa_dist.config.paths import local_path
from lisa_dist.config.run_directory import RunDirectory


def run(config: Config) -> int:
    """Export the checkpoint that ``export.step`` names, or the newest, to ``export.path``.

    Raises:
        UserError: a path is missing, or there is nothing to export.
    """
    if config.run.dir is None:
        raise UserError("run.dir=null: name the directory of the run to export")
    if config.export.path is None:
        raise UserError("export.path=null: name the Hugging Face directory to write")
    target = local_path(config.export.path)
    checkpoint = find_checkpoint(RunDirectory.of(config).checkpoints, config.export.step)
    files = export_checkpoint(config, checkpoint, target)
    print(f"{target}: {len(files)} file{'s' if len(files) > 1 else ''} of weights from {checkpoint}")
    return EXIT_DONE
