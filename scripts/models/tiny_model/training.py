"""The training loop: AdamW, warm-up and cosine by wall clock or steps, best checkpoint kept."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scripts.models.tiny_model.batches import WindowSampler
from scripts.models.tiny_model.network import TinyMoe

logger = logging.getLogger(__name__)

BALANCE_WEIGHT = 0.01
EMA_EVERY_STEPS = 8
EMA_DECAY = 0.98
CLIP_NORM = 1.0
SYNC_EVERY_STEPS = 20

LossFunction = Callable[[TinyMoe, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What a run is told; `num_steps` set means that steps end it, not the clock."""

    batch: int
    peak_lr: float
    warmup_steps: int
    duration_s: float
    num_steps: int | None
    report_every_s: float
    num_evaluations: int
    weight_decay: float
    compile: bool


@dataclass(slots=True)
class TrainingResult:
    """What a run found; perplexities are of the validation text, in training precision."""

    num_steps: int = 0
    num_tokens: int = 0
    elapsed_s: float = 0.0
    final_loss: float = math.nan
    best_perplexity: float = math.inf
    best_source: str = ""
    best_step: int = 0
    history: list[tuple[int, float, float]] = field(default_factory=list)
    best_weights: dict[str, Tensor] = field(default_factory=dict)


def autocast(device: torch.device) -> torch.autocast:
    """BF16 on CUDA; the CPU trains in float32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def perplexity(model: TinyMoe, tokens: Tensor, window: int) -> float:
    """exp of the mean negative log-likelihood over consecutive windows of `window` tokens.

    `tokens` int64 [total] on the model's device. Each window's first token is context only; a
    last, shorter window is left out unless it is the only one.
    """
    usable = min(len(tokens), window)
    rows = tokens[: len(tokens) // usable * usable].view(-1, usable)
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=tokens.device)
    with torch.no_grad():
        for part in torch.split(rows, 16):
            logits, _ = model(part)
            flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
            total += functional.cross_entropy(flat, part[:, 1:].reshape(-1), reduction="sum").double()
    model.train(was_training)
    return math.exp(total.item() / (rows.shape[0] * (usable - 1)))


def loss_of(model: TinyMoe, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Training loss and its cross-entropy part for int64 [batch, length + 1]."""
    logits, balance = model(windows[:, :-1])
    entropy = functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
    return entropy + BALANCE_WEIGHT * balance, entropy


class Trainer:
    """One run over one model."""

    def __init__(
        self,
        model: TinyMoe,
        sampler: WindowSampler,
        validation: Tensor,
        settings: TrainingSettings,
    ) -> None:
        self.model = model
        self.sampler = sampler
        self.validation = validation
        self.settings = settings
        self.device = validation.device
        self.result = TrainingResult()
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))  # type: ignore[no-untyped-call]
        matrices = [p for p in model.parameters() if p.dim() >= 2]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": settings.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=settings.peak_lr,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )
        self.loss_of: LossFunction = loss_of

    def _prepare(self) -> None:
        """Compile outside the time budget; go on without when the compiler does not work here."""
        if not self.settings.compile:
            logger.info("torch.compile: off, as asked")
            return
        started = time.monotonic()
        compiled: LossFunction = torch.compile(loss_of)
        try:
            with autocast(self.device):
                loss, _ = compiled(self.model, self.sampler.draw(self.settings.batch))
            loss.backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, OSError, ImportError) as error:
            # Dynamo's and Inductor's errors are RuntimeErrors; a missing C compiler is an OSError.
            logger.warning("torch.compile failed, training eagerly: %s", str(error)[:500])
        else:
            self.loss_of = compiled
            logger.info("torch.compile: on, %.1f s to compile", time.monotonic() - started)
        self.optimizer.zero_grad(set_to_none=True)

    def _progress(self, step: int, elapsed_s: float) -> float:
        if self.settings.num_steps is not None:
            return step / self.settings.num_steps
        return elapsed_s / self.settings.duration_s

    def _set_rate(self, step: int, progress: float) -> None:
        warm = min(1.0, (step + 1) / self.settings.warmup_steps)
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.peak_lr * warm * decay

    def _step(self) -> Tensor:
        with autocast(self.device):
            loss, entropy = self.loss_of(self.model, self.sampler.draw(self.settings.batch))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return entropy.detach()

    def _evaluate(self, step: int) -> None:
        """Perplexity of the weights and of their running average; the best so far is copied."""
        average = self.average.module
        if not isinstance(average, TinyMoe):
            raise TypeError(f"averaged model is a {type(average).__name__}")
        found: dict[str, float] = {}
        for source, model in (("weights", self.model), ("average", average)):
            with autocast(self.device):
                found[source] = perplexity(model, self.validation, self.sampler.length)
            if found[source] < self.result.best_perplexity:
                self.result.best_perplexity = found[source]
                self.result.best_source, self.result.best_step = source, step
                self.result.best_weights = {
                    name: value.detach().clone() for name, value in model.state_dict().items()
                }
        self.result.history.append((step, found["weights"], found["average"]))
        logger.info(
            "step %d: validation perplexity %.3f, of the averaged weights %.3f (best %.3f)",
            step,
            found["weights"],
            found["average"],
            self.result.best_perplexity,
        )

    def _report(self, step: int, elapsed_s: float, loss: float) -> None:
        tokens = step * self.settings.batch * self.sampler.length
        logger.info(
            "step %d, %.0f s, loss %.4f, %.0f thousand tokens/s, %.1f million tokens",
            step,
            elapsed_s,
            loss,
            tokens / max(elapsed_s, 1e-9) / 1e3,
            tokens / 1e6,
        )

    def run(self) -> TrainingResult:
        """Train to the end of the budget; the model holds the best weights afterwards."""
        self.model.train()
        self._prepare()
        started = time.monotonic()
        step, reported_s, next_evaluation, progress = 0, 0.0, 1.0, 0.0
        loss = torch.full((), math.nan)
        while progress < 1.0:
            self._set_rate(step, progress)
            loss = self._step()
            step += 1
            if step % EMA_EVERY_STEPS == 0:
                self.average.update_parameters(self.model)
            if step % SYNC_EVERY_STEPS == 0:
                loss.item()  # waits for the GPU: without it the clock below runs ahead of the work
            elapsed_s = time.monotonic() - started
            if elapsed_s - reported_s >= self.settings.report_every_s:
                reported_s = elapsed_s
                self._report(step, elapsed_s, loss.item())
            progress = self._progress(step, elapsed_s)
            if progress * self.settings.num_evaluations >= next_evaluation:
                next_evaluation = math.floor(progress * self.settings.num_evaluations) + 1.0
                self._evaluate(step)
        if not self.result.history or self.result.history[-1][0] != step:
            self._evaluate(step)
        self.result.num_steps = step
        self.result.num_tokens = step * self.settings.batch * self.sampler.length
        self.result.elapsed_s = time.monotonic() - started
        self.result.final_loss = loss.item()
        self._report(step, self.result.elapsed_s, self.result.final_loss)
        self.model.load_state_dict(self.result.best_weights)
        return self.result
