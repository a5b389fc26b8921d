"""ForecasterModule: the LightningModule that trains a `LoadNetwork` on a router trace: losses, metrics, optimizer.

Shape suffixes: B sequences, T positions, L MoE layers, E logical experts.
"""

import ctypes
import logging
import math
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor, nn

from data.datamodule import RouterTraceModule
from data.models.layout import MoELayout
from data.models.weights import read_embedding
from data.traces.dataset import TraceSample
from predictor.evaluation.metrics import LayerMean, likeliest, load_tv, token_top1
from predictor.forecaster import NeuralForecaster
from predictor.network import Architecture, LoadNetwork, Prediction
from predictor.training.losses import distillation_loss, load_loss, sequence_loss, token_loss

ENDLESS_WARM_UP = 100
log = logging.getLogger(__name__)


def one_cycle(step: int, steps: float) -> float:
    """Factor (0 to 1) of the learning rate: linear warm-up over the first tenth of the steps, then a cosine to zero.

    A training without an end, of infinite steps, warms up over `ENDLESS_WARM_UP` of them and stays at its peak.
    """
    warm_up = max(int(steps) // 10, 1) if math.isfinite(steps) else ENDLESS_WARM_UP
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * min((step - warm_up) / max(steps - warm_up, 1), 1.0)))


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory: it gave that of every step back to the system, which cost a quarter of a step."""
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    with suppress(OSError, AttributeError):  # other systems
        libc = ctypes.CDLL(None)
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 25)  # the most it takes


class ForecasterModule(LightningModule):
    """Trains a `LoadNetwork` on a trace; layout and, unless it learns its own, embedding come from the trace's model.

    Args:
        architecture: Shape of the network.
        learning_rate: Peak of AdamW's one-cycle schedule.
        token_weight: Weight of the loss on input tokens; the losses on decoder and history have weight 1.
        encoder_load_weight: Weight of the load loss of the input layers.
        distillation_weight: Weight of the loss on the routers' likeliest experts; above 0 the trace must contain them.
        weight_decay: AdamW's decoupled weight decay.
    """

    network: LoadNetwork
    embedding: Tensor | None

    def __init__(
        self,
        architecture: Architecture = Architecture(),
        learning_rate: float = 4e-3,
        token_weight: float = 1.0,
        encoder_load_weight: float = 1.0,
        distillation_weight: float = 0.0,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(
            {"architecture": asdict(architecture), "learning_rate": learning_rate,
             "token_weight": token_weight, "encoder_load_weight": encoder_load_weight,
             "distillation_weight": distillation_weight, "weight_decay": weight_decay}
        )  # fmt: skip
        self.architecture = architecture
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.weights = {"token": token_weight, "load": encoder_load_weight, "distillation": distillation_weight}

    def setup(self, stage: str) -> None:
        """Builds the network for the trace's model and, unless it learns its own, reads that model's embedding table.

        Raises:
            ValueError: If the embedding table does not fit the trace, or has values that are not finite.
        """
        if hasattr(self, "network"):
            return
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, RouterTraceModule)
        self.layout: MoELayout = data.layout
        self.network = LoadNetwork(self.layout, self.architecture)
        if self.network.embedding is not None:
            self.embedding = None
            return
        self.register_buffer("embedding", read_embedding(self.layout.model_id, self.layout.revision), persistent=False)
        assert self.embedding is not None
        if len(self.embedding) < self.layout.vocab_size:
            raise ValueError(
                f"{self.layout.model_id} has {len(self.embedding)} embeddings, the trace was made with a vocabulary of "
                f"{self.layout.vocab_size}; collect the trace again"
            )
        if not self.embedding.isfinite().all():
            raise ValueError(f"the embedding table of {self.layout.model_id} contains NaN or infinite numbers")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the fingerprint of the trace's model and the id of the W&B run, which a resumed training continues."""
        checkpoint["fingerprint"] = self.layout.fingerprint()
        ids = (logger.version for logger in self.loggers if isinstance(logger, WandbLogger))
        checkpoint["wandb_run"] = next(ids, None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of a run for another model.

        Raises:
            ValueError: Naming both fingerprints.
        """
        if (found := checkpoint.get("fingerprint")) != self.layout.fingerprint():
            raise ValueError(
                f"the checkpoint is of a run for a model with fingerprint {found}, the trace's model has "
                f"{self.layout.fingerprint()}; leave --ckpt_path out"
            )

    def forward(self, sample: TraceSample) -> Prediction:
        """Forecasts one batch."""
        tokens = sample.trace.upcoming
        x_BTD = self.network.embed(tokens.input_ids, self.embedding)
        prediction: Prediction = self.network(x_BTD, tokens.mask, sample.history, tokens.computed)
        return prediction

    def losses(self, prediction: Prediction, sample: TraceSample) -> dict[str, Tensor]:
        """Cross-entropies of input tokens and of decoder sequences, and load losses with tokens known and unknown."""
        split = self.layout.num_input_layers
        past_share = self.network.history.share(sample.history)
        losses = {
            "token": token_loss(prediction, sample.trace),
            "sequence": sequence_loss(prediction, sample.trace),
            "load": load_loss(prediction.load[:split], sample.load[:split]),
            "decoder": load_loss(prediction.load[split:], sample.load[split:]),
            "history": load_loss(past_share * sample.load.sum(-1, keepdim=True), sample.load),
        }
        if self.weights["distillation"]:
            losses["distillation"] = distillation_loss(prediction, sample.trace)
        return losses

    def on_fit_start(self) -> None:
        """Uses one thread: a step is too small to split, and waiting threads stall on a busy machine."""
        self.threads = torch.get_num_threads()
        torch.set_num_threads(1)
        keep_freed_memory()
        self.began = time.perf_counter(), time.process_time()

    def on_fit_end(self) -> None:
        """Measures the fit: seconds of wall time, and of processor time, which other programs do not lengthen."""
        self.seconds = time.perf_counter() - self.began[0]
        self.cpu_seconds = time.process_time() - self.began[1]
        torch.set_num_threads(self.threads)

    def logs_now(self) -> bool:
        """Whether the trainer logs this step; recording every step's figures took a tenth of the training."""
        every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        return bool((self.global_step + 1) % every == 0)

    def training_step(self, sample: TraceSample, step: int) -> Tensor:
        """Loss of one training batch: the weighted sum of its losses, each of which is logged."""
        loss = self.losses(self(sample), sample)
        if self.logs_now():
            self.log_dict({f"train/{name}_loss": value for name, value in loss.items()}, batch_size=1)
        return torch.stack([self.weights.get(name, 1.0) * value for name, value in loss.items()]).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Logs the norm of the gradient before it is clipped.

        Raises:
            ValueError: If it is NaN or infinite.
        """
        norm = nn.utils.get_total_norm([p.grad for p in self.network.parameters() if p.grad is not None])
        if not norm.isfinite():
            raise ValueError(
                f"the gradient of step {self.global_step} is {float(norm)}; lower --model.learning_rate, or raise "
                "--trainer.precision"
            )
        if self.logs_now():
            self.log("train/gradient_norm", norm)

    def on_validation_epoch_start(self) -> None:
        """Resets the means."""
        self.means: dict[str, LayerMean] = {}

    def validation_step(self, sample: TraceSample, step: int) -> None:
        """Adds load error and token top-1 of a batch to the means over the validation batches."""
        prediction = self(sample)
        chosen = likeliest(prediction.token_logits, self.layout.experts_per_token)
        values = {
            "load_tv": load_tv(prediction.load, sample.load),
            "token_top1": token_top1(chosen, sample.trace.experts),
        }
        for name, value in values.items():
            mean = self.means.setdefault(f"val/{name}", LayerMean(len(value)).to(value.device))
            mean.update(value)

    def on_validation_epoch_end(self) -> None:
        """Logs load error (its mean picks the best checkpoint) and token top-1, overall and of each layer."""
        for name, mean in self.means.items():
            layers = mean.compute().reshape(-1)  # torchmetrics makes a scalar of one layer's mean
            self.log(name, layers.nanmean().float(), prog_bar=True)
            for layer, value in zip(self.layout.layer_names, layers.float(), strict=False):
                self.log(f"layers/{name}/{layer}", value)

    def load_best(self) -> None:
        """Loads the weights of the checkpoint with the lowest validation error; keeps the present ones without one.

        A checkpoint names the place where it was written. If the run's folder has moved since, the file in it counts.
        """
        callback: Any = self.trainer.checkpoint_callback
        if not getattr(callback, "best_model_path", ""):
            log.warning("no checkpoint was validated: the predictor has the weights of the last step")
            return
        written = Path(callback.best_model_path)
        here = Path(callback.dirpath) / written.name
        best = here if here.exists() else written
        self.load_state_dict(torch.load(best, map_location="cpu", weights_only=True)["state_dict"])

    def forecaster(self) -> NeuralForecaster:
        """A forecaster with the present weights, on the CPU; its spread is not calibrated yet."""
        network = LoadNetwork(self.layout, self.architecture)
        network.load_state_dict({name: value.cpu() for name, value in self.network.state_dict().items()})
        table = None if self.embedding is None else self.embedding.cpu()
        return NeuralForecaster(self.layout, network, table, torch.ones(2, self.layout.num_layers, 3))

    def configure_optimizers(self) -> Any:
        """AdamW under a one-cycle schedule that ends with the last epoch."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: one_cycle(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
