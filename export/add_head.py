"""Adding a draft head to an engine directory: read it, round it, write its graphs, rewrite the manifest."""

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from calibration.draft_heads.prepared import PreparedDraftHead
from calibration.precisions.base import Precision
from calibration.precisions.catalog import DEFAULT_HEAD_CHOICE, head_choices, precisions_for
from engines.contract import Contract, top_k_for
from engines.directory import EngineDirectory, open_directory
from engines.draft_head import FOLDER, DraftHeadFiles
from engines.manifest import Manifest
from engines.onnxruntime.files import required_native_graph
from export.build_options import Reporter, Silent
from export.publishing import drop_leftovers, locked, publish_head
from quasar.checkpoints import Checkpoint, open_checkpoint
from quasar.checkpoints.checkpoint import checkpoint_hash
from quasar.draft_heads.folder import DraftHead
from quasar.draft_heads.spec import DraftHeadSpec
from quasar.errors import BuildError, QuasarError
from quasar.files import atomic_path, sha256_file, sha256_json

if TYPE_CHECKING:
    import onnx_ir as ir

_EMBEDDING = "embed_tokens.weight"
_CANONICAL = "canonical.data"


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierSizes:
    """What a head has to fit, of an engine without its checkpoint."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    context_length: int


def add_head(
    directory: Path,
    head: Path,
    *,
    precision: str = DEFAULT_HEAD_CHOICE,
    model: str | None = None,
    reporter: Reporter | None = None,
) -> EngineDirectory:
    """Make a draft head part of an engine directory, in place of one that it has; returns it, opened again.

    New files come first and the manifest last.

    Args:
        head: a folder that `quasar.draft_heads.folder` reads.
        precision: of its linears, as `--precision` names them.
        model: the checkpoint that the engine was built from; None: what its manifest names. Read where the head lacks
            tensors that are the model's.

    Raises:
        QuasarError: a head of another model or with options that no graph has, an engine without native kernels, or
            another run that is at it.
    """
    reporter = Silent() if reporter is None else reporter
    # What another run publishes meanwhile would be lost: the directory is read where there is none.
    with locked(directory):
        opened = open_directory(directory)
        chosen = _precision(precision)
        native = required_native_graph(directory, opened.manifest, "on which draft heads run")
        embedding = _embedding(opened, native)
        rows, hidden_size = (int(extent) for extent in embedding.shape.numpy())
        contract = opened.manifest.contract
        sizes = VerifierSizes(
            hidden_size=hidden_size,
            vocab_size=rows,
            num_layers=contract.num_layers,
            context_length=int(opened.manifest.model["context_length"]),
        )
        reporter.stage("head", str(head))
        found = DraftHead(head, sizes)
        _check_layers(opened.manifest, found.spec)
        prepared = PreparedDraftHead(head=found, precision=chosen, target=_target(opened.manifest, found.spec, model))
        drop_leftovers(opened, FOLDER)
        reporter.stage("write", f"{found.spec.kind}, {precision}, on native kernels")
        files = write_head(opened.path, contract, prepared, embedding, engine=opened.manifest.engine_hash)
        publish_head(opened, files)
    return open_directory(directory)


def _precision(choice: str) -> Precision:
    if choice not in head_choices():
        raise BuildError(f"--precision of a draft head is {choice!r}; {', '.join(head_choices())} were expected")
    return precisions_for(choice)[0]


def write_head(
    directory: Path,
    contract: Contract,
    prepared: PreparedDraftHead,
    embedding: "ir.ExternalTensor",
    *,
    engine: str,
) -> DraftHeadFiles:
    """Write graphs and weights below an engine directory; what the manifest says of them.

    `contract`: the verifier's. `embedding`: its table. `engine`: tells heads of one folder for several engines apart.
    """
    import onnx_ir as ir

    # They import onnx_ir, which a refusal does not wait for.
    from export.draft_head import build_fuse, build_head
    from export.passes import LinearsToNative, LowerToNative, StoredWeights, UnsignedActivations
    from export.weight_file import WeightFile

    head = prepared.head
    spec, producer = head.spec, version("quasar-verifier")
    top_k = top_k_for(spec.draft_vocab_size)
    digest = sha256_json([sha256_file(path) for path in head.files])
    name = sha256_json([digest, prepared.precision.name, producer, engine])[:8]
    folder = directory / FOLDER
    folder.mkdir(exist_ok=True)
    graph, fuse, weights = (f"{FOLDER}/{name}.{part}" for part in ("head.onnx", "fuse.onnx", "data"))
    # Other bytes have another name, and the same ones take their place whole: a run that is killed has changed no file
    # that the manifest names.
    with (
        tempfile.TemporaryDirectory(dir=folder) as scratch,
        atomic_path(directory / weights) as temporary,
        WeightFile(temporary, directory, named=directory / weights) as packed,
    ):
        if spec.own_embedding:
            embedding = packed.append(_EMBEDDING, head.read(_EMBEDDING))
        with WeightFile(Path(scratch) / _CANONICAL) as canonical:
            model = build_head(
                spec,
                prepared,
                canonical,
                embedding,
                head.targets,
                capacity=contract.capacity,
                top_k=top_k,
                producer_version=producer,
            )
            second = build_fuse(spec, prepared, canonical, producer)
        stored = StoredWeights(packed)
        LowerToNative(spec.decoder, stored)(model)
        LinearsToNative(stored)(second)
        for one, path in ((model, graph), (second, fuse)):
            UnsignedActivations()(one)
            for value in one.graph.initializers.values():
                tensor = value.const_value
                if isinstance(tensor, ir.ExternalTensor) and tensor.location == _CANONICAL:
                    value.const_value = packed.append(str(value.name), tensor.numpy())
            with atomic_path(directory / path) as written:
                ir.save(one, written)
    return DraftHeadFiles(
        kind=spec.kind,
        graph=graph,
        fuse=fuse,
        weights=weights,
        precision=prepared.precision.name,
        hidden_size=spec.decoder.hidden_size,
        num_kv_heads=spec.decoder.num_kv_heads,
        head_size=spec.decoder.head_size,
        draft_vocab_size=spec.draft_vocab_size,
        top_k=top_k,
        parameters=sum(linear.outputs * linear.inputs for linear in spec.linears()),
        feature_layers=spec.feature_layers,
        source=head.location.name,
        sha256=digest,
    )


def _embedding(opened: EngineDirectory, graph: str) -> "ir.ExternalTensor":
    """The verifier's table, where its graph has it."""
    import onnx_ir as ir  # which a refusal does not wait for

    tensor = ir.load(opened.file(graph)).graph.initializers[_EMBEDDING].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    return tensor


def _check_layers(manifest: Manifest, spec: DraftHeadSpec) -> None:
    """Raise `BuildError` for hidden states that the engine's passes do not tell."""
    if spec.feature_layers[0] == 0:
        raise BuildError(
            f"the draft head reads what enters the layers {list(spec.feature_layers)}, and what enters layer 0 are "
            "embeddings, which an engine's passes do not tell: take a head that reads later ones"
        )
    if manifest.is_rotated:
        raise BuildError(
            "the engine was built with --rotate, and a draft head reads hidden states as the checkpoint has them: add "
            "it to an engine that is not rotated"
        )
    if manifest.skipped_layers:
        raise BuildError(
            f"the engine was built without the layers {manifest.skipped_layers}, and the draft head reads what enters "
            f"the layers {list(spec.feature_layers)} of the whole model: add it to an engine that has all layers"
        )


def _target(manifest: Manifest, spec: DraftHeadSpec, model: str | None) -> Checkpoint | None:
    """The checkpoint of the verifier, where the head lacks tensors of its own; raises `BuildError` where it is gone."""
    if spec.own_head and not spec.normed:
        return None
    source = model or str(manifest.model["source"])
    try:
        checkpoint = open_checkpoint(source)
    except QuasarError as error:
        raise BuildError(
            f"the draft head needs the model's {_lent(spec)}, and the model cannot be read ({error}): name the "
            "checkpoint that the engine was built from with --model"
        ) from None
    if checkpoint_hash(checkpoint) != manifest.hashes["checkpoint"]:
        raise BuildError(
            f"{source} is not the model that the engine was built from (its files' hashes differ), and the draft head "
            f"takes the {_lent(spec)} of that one: name it with --model"
        )
    return checkpoint


def _lent(spec: DraftHeadSpec) -> str:
    """What a head takes of its model's checkpoint."""
    return " and ".join([*(["final norm"] if spec.normed else []), *([] if spec.own_head else ["LM head"])])
