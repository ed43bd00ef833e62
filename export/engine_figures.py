"""What a build measures of its engine on this machine: probes, latency, and fidelity against the float model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.engine_logits import engine_logits
from calibration.fidelity import LogitsReader, compare
from calibration.precisions.catalog import precision_of
from calibration.search import Effort
from calibration.texts import TokenizedText
from engines.contract import Contract
from engines.onnxruntime.executed import check_integer_matmuls, executed_kernels
from engines.onnxruntime.graphs import Graphs
from engines.onnxruntime.kernels import Kernels
from engines.onnxruntime.probing import probe_graphs, runs_stock_integers, this_machine
from engines.probes.driver import full_plan, sampled_plan
from engines.record import MachineRecord
from engines.successors import count_successors
from export.build_options import Reporter
from export.layout import CANONICAL

# Of weights: above it, the stock graph is checked on its first layers.
_LARGE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredEngine:
    """What was measured of an engine that is not published yet."""

    calibration: dict[str, Any]
    record: MachineRecord
    fidelity: dict[str, Any]


def probe(
    graphs: Graphs,
    stock: Graphs | None,
    contract: Contract,
    linears: Mapping[str, str],
    kernels: Kernels,
    effort: Effort,
    reporter: Reporter,
) -> MachineRecord:
    """Integer matmuls, row invariance and latency with `kernels`; `stock`: the portable graph, if it is checked too."""
    stock_integers = runs_stock_integers(graphs.graph)
    thorough = effort == "thorough"
    plan = full_plan(contract) if thorough else sampled_plan(contract, fixed_order=kernels.fixed_order)
    with reporter.steps("probes and latency", plan.count_steps(contract)) as step:
        record = probe_graphs(
            graphs,
            contract,
            this_machine(0, kernels),
            plan,
            has_integers=stock_integers,
            on_step=lambda: step(1),
        )
    if stock is not None:
        _check_stock_integers(stock, contract, linears, exact_integers=record.exact_integers)
    return record


def _check_stock_integers(
    stock: Graphs, contract: Contract, linears: Mapping[str, str], *, exact_integers: bool
) -> None:
    """The portable path must not silently run in float, whatever runs here.

    ONNX Runtime keeps packed copies of all weights in memory: of a large model the first layers are checked, which have
    every form of linear that the others have.
    """
    graph, checked = stock.graph, contract
    if (stock.directory / f"{CANONICAL}.data").stat().st_size > _LARGE_BYTES:
        graph, checked = stock.probe, replace(contract, num_layers=stock.probe_layers)
    integers = [
        name
        for name, precision in linears.items()
        if precision_of(precision).has_integer_activations
        and (checked is contract or name.startswith(tuple(f"layers.{layer}." for layer in range(stock.probe_layers))))
    ]
    if integers:
        check_integer_matmuls(
            executed_kernels(stock.directory, graph, checked, exact_integers=exact_integers), integers
        )


def fidelity(
    reference: LogitsReader,
    graphs: Graphs,
    contract: Contract,
    record: MachineRecord,
    texts: Sequence[TokenizedText],
    reporter: Reporter,
) -> dict[str, Any]:
    """KL, top-1 and perplexity of the engine on fixed texts; `reference`: the float model's logits over them."""
    session = graphs.open(contract, exact_integers=record.exact_integers)
    with reporter.steps("fidelity", len(texts)) as step:
        return compare(texts, reference, engine_logits(session), on_text=lambda: step(1))


def successors(
    graphs: Graphs,
    contract: Contract,
    record: MachineRecord,
    texts: Sequence[TokenizedText],
    reporter: Reporter,
) -> dict[int, list[int]]:
    """Token → what the engine holds likeliest after it, over some texts (engines.successors)."""
    session = graphs.open(contract, exact_integers=record.exact_integers)

    def passes() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        for text in texts:
            tokens = np.array(text.tokens, np.int64)
            for begin in range(0, len(tokens), contract.prefill_chunk):
                chunk = tokens[begin : begin + contract.prefill_chunk]
                session.run(chunk, begin, len(chunk))
                assert session.top_tokens is not None
                yield chunk, session.top_tokens
            step(1)

    with reporter.steps("successors", len(texts)) as step:
        return count_successors(passes(), contract.top_k)
