"""Where the metrics of a run go for people to look at: TensorBoard files beside its checkpoints, or MLflow."""

import tempfile

from mellow_platform import storage
from mellow_platform.training.run_config import RunSection


class Tracker:
    """Writes metrics by step; a run that is resumed goes on in its place."""

    def __init__(self, config: RunSection, run: str, step: int):
        """Open the tracker that `config` names for the run in the folder `run`, which is at `step`."""
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
        known = mlflow.search_runs(filter_string=f"tags.run_folder = '{run}'", output_format="list")
        mlflow.start_run(run_id=known[0].info.run_id if known else None, run_name=config.run, tags={"run_folder": run})

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.folder:
            for name, value in metrics.items():
                self.writer.add_scalar(name, value, step)
        else:
            self.mlflow.log_metrics(metrics, step=step)

    def upload(self) -> None:
        """Bring what was written so far to the run's folder."""
        if self.folder:
            self.writer.flush()
            storage.upload(self.folder.name, storage.join(self.run, "tensorboard"))

    def close(self) -> None:
        self.upload()
        if self.folder:
            self.writer.close()
        else:
            self.mlflow.end_run()
