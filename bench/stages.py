"""The stages of `make gpu`: what they run, and how long each may take."""

from __future__ import annotations

import sys

from .budget import Stage
from .results import QUESTIONS

BUILD = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_issued.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
)
#: Of csrc/cuda.
KERNELS = ("update_kernel", "sq_norm_kernel", "factored_update_kernel", "factored_sq_norm_kernel")
KERNELS += ("sums_of_matrices_kernel", "sums_of_strips_kernel", "add_parts_kernel", "total_kernel")
KERNELS += ("inverse_rms_kernel", "adalomo_factors_kernel", "adalomo_scale_kernel", "replace_states_kernel")
NCU = [
    "ncu",
    "--clock-control",
    "none",
    "-k",
    f"regex:{'|'.join(KERNELS)}",
    "--metrics",
    ",".join(COUNTERS),
]

# Every variant of a Triton kernel, which takes seconds to compile: data types, roundings, aligned and not, with and
# without clamp, norm, list and shard.
VARIANTS = (
    "(every_size_and_alignment and (-4097] or -65537])) or (in_the_same_pass and (-511] or -65537])) or list_form "
    "or equals_its_part or all_65536 or equal_the_oracle or every_key_of or (adversarial and 3000001) or not_finite "
    "or (layouts and large) or found_inf or accumulates"
)
# compute-sanitizer makes a kernel some hundred times slower.
SANITIZED = "(list_form and -all]) or (in_the_same_pass and bfloat16 and -511]) or accumulates"


def pytest(*arguments: str, workers: int = 0) -> list[str]:
    """Tests for a GPU. Worker processes of pytest-xdist share Triton's cache."""
    plugins = ["-p", "no:cacheprovider", "-p", "bench.outcomes"]
    spread = ["-n", str(workers)] if workers else ["-p", "no:xdist"]
    limits = ["--timeout=90", "--maxfail=60"]
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *plugins, *spread, *limits, *arguments]


def bench(name: str, limit: float, questions: str, *options: str, **environment: str) -> Stage:
    """A stage that measures."""
    table = ["--benchmark-enable", "--benchmark-columns=median,iqr,rounds", "--benchmark-sort=fullname"]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "bench.outcomes"]
    asked = [QUESTIONS[question] for question in questions.split()]
    shared = ["--device=cuda", "--processes=3"]  # a third of the rounds
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *table, *shared, *asked, *options]
    return Stage(name, limit, command, environment)


def stages(capability: str, cores: int) -> list[Stage]:
    """All of them, in the order of their value."""
    workers = max((cores - 4) // 2, 1)
    files = ("tests/test_sgd.py", "tests/test_sq_norm.py", "tests/test_split.py")
    variants = pytest("-k", VARIANTS, *files, workers=workers)
    others = pytest("-k", f"not ({VARIANTS})", *files, workers=workers)
    features = pytest("-k", "not more_than_2_to", "tests/test_gpu.py", workers=max(cores // 5, 1))
    beyond = pytest("-k", "more_than_2_to", "tests/test_gpu.py")
    more = pytest("tests/test_distributed_backends.py", "tests/test_plan.py")
    cuda, triton = {"LOMO_KERNELS_BACKEND": "cuda"}, {"LOMO_KERNELS_BACKEND": "triton"}
    uncached = cuda | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer, sanitized = (
        ["compute-sanitizer", "--error-exitcode", "9", "--tool"],
        pytest("-x", "-k", SANITIZED, *files),
    )
    large, ours = "16777216 or 268435456", "(sgd_ or sq_norm_) and "
    steps = ("--full", "-k")
    layers = "(linear and bfloat16) or (291 and bfloat16) or captured"
    simulated = "llama-1b and checkpointing and not lomo_optim and not fp32 and not foreach and not clipping"
    counted = bench("", 0, "update norm", "--full", "-k", f"{ours} bfloat16 and 268435456").command
    counted = [*NCU, *(word for word in counted if word != "--benchmark-enable")]  # then each is called once
    return [
        Stage("build", 150, BUILD, {"LOMO_CUDA": "1", "LOMO_CUDA_ARCHS": capability.replace(".", "")}),
        bench("ceilings", 40, "ceilings", "--processes=1"),
        Stage("bits-cuda", 150, pytest(*files, workers=workers), cuda, together="tests"),
        Stage("bits-triton", 200, variants, triton, together="tests"),
        Stage("features", 200, features, together="tests"),
        Stage("factored", 200, pytest("tests/test_gpu_factored.py", workers=max(cores // 8, 1)), together="tests"),
        Stage("memcheck", 150, [*sanitizer, "memcheck", *sanitized], uncached, together="tests"),
        bench("bandwidth-cuda", 80, "update norm lists", "--full", "-k", f"{large} or lists", **cuda),
        bench("bandwidth-triton", 45, "update norm", "--full", "-k", f"{ours} ({large})", **triton),
        bench("layers", 90, "linear hooks captured", "--full", "-k", layers),
        bench("step-1B", 60, "step", *steps, "1.1B and 1024 and not checkpointing"),
        bench("step-7B", 110, "step", *steps, "6.7B and 1024 and not checkpointing"),
        bench("rules", 60, "clipping", *steps, "not checkpointing and (AdaLomo or clip_tensor)"),
        bench("head", 40, "head", *steps, "not chunks"),
        bench("memory", 60, "memory", "-k", simulated),
        Stage("beyond-2-31", 120, beyond, cuda),
        Stage("ncu", 80, counted, cuda),
        Stage("racecheck", 110, [*sanitizer, "racecheck", *sanitized], uncached),
        Stage("more", 120, more),
        bench("embedding", 40, "embedding", "--full"),
        Stage("features-triton", 150, features, triton),
        Stage("others-triton", 300, others, triton),
    ]
