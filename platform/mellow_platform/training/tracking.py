"""Experiment tracking: TensorBoard files beside the checkpoints of a run, or MLflow."""

import tempfile

from mellow_platform import storage
from mellow_platform.training.run_config import RunSection


class Tracker:
    """Writer of metrics by step; a resumed run continues its earlier curves."""

    def __init__(self, config: RunSection, run: str, step: int):
        """Open the tracker that `config` names for the run in the folder `run`, which resumes at `step`."""
        self.run = run
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        if config.tracking == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            self.folder = tempfile.TemporaryDirectory()
            self.writer = SummaryWriter(self.folder.name, purge_step=step + 1)
            return
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment("mellow")
        runs = mlflow.search_runs(filter_string=f"tags.run_folder = '{run}'", output_format="list")
        mlflow.start_run(run_id=runs[0].info.run_id if runs else None, run_name=config.run, tags={"run_folder": run})

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.folder:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        else:
            self.mlflow.log_metrics(metrics, step=step)

    def upload(self) -> None:
        """Copy the TensorBoard files to the run's folder."""
        if self.folder:
            self.writer.flush()
            storage.upload(self.folder.name, storage.join(self.run, "tensorboard"))

    def close(self) -> None:
        self.upload()
        if self.folder:
            self.writer.close()
        else:
            self.mlflow.end_run()
