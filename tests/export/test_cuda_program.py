"""The CUDA program of native graphs that are made by hand: one for each form, and what has none."""

import io
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from engines import contract as names
from engines.cuda.program import AddNorm, Attention, Embed, Head, Linear, Program, Select
from export.builder import GraphBuilder
from export.cuda_program import ProgramWriter
from quasar.errors import BuildError

HIDDEN, HEADS, SIZE, VOCABULARY, POSITIONS = 32, 2, 16, 20, 8
CONTRACT = SimpleNamespace(num_layers=1, head_size=SIZE, max_width=32, top_k=8)


class Graph:
    """A decoder of one layer as its native graph has it. `rest` is what a family has beside Llama's form."""

    def __init__(self, **rest):
        self.rest = rest
        self.native, self.canonical = GraphBuilder(), GraphBuilder()
        self.linears = {}

    def weight(self, name, array):
        self.canonical.weight(ir.tensor(array, name=name))
        return self.native.weight(ir.tensor(array, name=name))

    def norm(self, name, size=HIDDEN):
        return self.weight(name, np.ones(size, np.float32))

    def linear(self, name, x, inputs, outputs, output, *, norm=None, residual=None, **attributes):
        self.linears[name] = "w8a8-token"
        columns = 2 * outputs if any(attributes.values()) else outputs
        self.canonical.weight(ir.tensor(np.ones((inputs, columns), np.int8), name=f"{name}.weight"))
        self.canonical.weight(ir.tensor(np.ones(columns, np.float32), name=f"{name}.scale"))
        packed = [ir.Value(name=f"{name}.{part}") for part in ("packed", "packed_scales")]
        attributes = {"outputs": outputs, "epsilon": 1e-5, **attributes}
        return self.native.op("W8A8Linear", [x, *packed, None, residual, norm], output, attributes, domain="quasar")

    def added(self, name, x, inputs, stream, output):
        if not self.rest.get("output_norms"):
            return self.linear(name, x, inputs, HIDDEN, output, residual=stream)
        product = self.linear(name, x, inputs, HIDDEN, f"{name}.product")
        attributes = {"axis": -1, "epsilon": 1e-6}
        normed = self.native.op("RMSNormalization", [product, self.norm(f"{name}.norm")], f"{name}.normed", attributes)
        return self.native.op("Add", [stream, normed], output)

    def number(self, name, value):
        return self.native.constant(name, np.asarray(value, np.float32))

    def program(self):
        graph, rest = self.native, self.rest
        ids = graph.input(names.INPUT_IDS, ir.DataType.INT64, [1, "T"])
        rows = graph.input(names.LOGITS_ROWS, ir.DataType.INT64, ["M"])
        table = self.weight("embed_tokens.weight", np.ones((VOCABULARY, HIDDEN), np.float32))
        x = graph.op("Cast", [graph.op("Gather", [table, ids], "embedded.stored")], "embedded")
        if "embedding_scale" in rest:
            x = graph.op("Mul", [x, self.number("embedding_scale", rest["embedding_scale"])], "embedded.scaled")
        heads = HEADS * SIZE
        qkv = self.linear("qkv", x, HIDDEN, 3 * heads, "packed_qkv", norm=self.norm("input_norm"))
        angles = np.ones((POSITIONS, rest.get("rotary", SIZE) // 2), np.float32)
        tables = [graph.weight(ir.tensor(angles, name=f"{part}.table")) for part in ("cos", "sin")]
        sizes = rest.get("norm_sizes")
        norms = [self.norm(f"{part}_norm", size) for part, size in zip("qk", sizes, strict=True)] if sizes else []
        past = [ir.Value(name=name) for name in names.past_names(0)]
        inputs = [qkv, *past, None, None, *tables, None, *norms]
        attributes = {"num_heads": HEADS, "kv_num_heads": HEADS, **rest.get("attention", {})}
        context = graph.op("VerifyAttention", inputs, "context", attributes, domain="quasar")
        x = self.added("o", context, heads, x, "attended")
        gate = self.linear("gate_up", x, HIDDEN, 48, "mlp", norm=self.norm("mlp_norm"), **rest.get("gate", {"gate": 1}))
        x = self.added("down", gate, 48, x, "layer_output")
        selected = graph.op("Gather", [x, rows], "head_rows", {"axis": 1})
        caps = rest.get("caps")
        head = "logits.head" if caps else names.LOGITS
        logits = self.linear("lm_head", selected, HIDDEN, VOCABULARY, head, norm=self.norm("norm"))
        if caps:
            divided = graph.op("Div", [logits, self.number("cap.0", caps[0])], "logits.divided")
            bounded = graph.op("Tanh", [divided], "logits.bounded")
            logits = graph.op("Mul", [bounded, self.number("cap.1", caps[1])], names.LOGITS)
        best = graph.op("ArgMax", [logits], names.NEXT_TOKENS, {"axis": -1})
        graph.output(best, ir.DataType.INT64, [1, "M"])
        models = (one.model("verifier", "0") for one in (graph, self.canonical))
        return ProgramWriter(*models, CONTRACT, self.linears, io.BytesIO()).write("float16")


def steps_of(program, kind):
    return [step for step in program.steps if isinstance(step, kind)]


def test_a_graph_of_llamas_form():
    program = Graph().program()
    kinds = [type(step) for step in program.steps]
    assert kinds == [Embed, Linear, Attention, Linear, Linear, Linear, Select, Head]
    (embed,), (attention,), (head,) = (steps_of(program, kind) for kind in (Embed, Attention, Head))
    assert (embed.output, embed.scale, head.softcap) == ("embedded.stored", 1.0, 0.0)
    assert [step.gate for step in steps_of(program, Linear)] == ["", "", "silu", ""]
    assert [step.residual for step in steps_of(program, Linear)] == ["", "embedded.stored", "", "attended"]
    assert (attention.rotary, attention.row_norm, attention.q_norm) == (SIZE, False, "")
    assert Program.from_json(program.to_json()) == program


def test_norms_after_linears_are_added_to_the_stream():
    program = Graph(output_norms=True, embedding_scale=5.5).program()
    first, second = steps_of(program, AddNorm)
    assert first == AddNorm(
        input="o.product",
        norm="o.norm",
        epsilon=1e-6,
        residual="embedded.stored",
        columns=HIDDEN,
        output="attended",
    )
    assert (second.input, second.residual, second.output) == ("down.product", "attended", "layer_output")
    assert not any(step.residual for step in steps_of(program, Linear))
    (embed,) = steps_of(program, Embed)
    assert embed.scale == 5.5
    assert Program.from_json(program.to_json()) == program


@pytest.mark.parametrize(
    ("attributes", "gate"), [({"gate": 2}, "gelu_tanh"), ({"gate": 1}, "silu"), ({"swiglu": 1}, "silu")]
)
def test_gates_have_names_and_earlier_graphs_have_swiglu(attributes, gate):
    step = steps_of(Graph(gate=attributes).program(), Linear)[2]
    assert (step.gate, step.outputs) == (gate, 48)


def test_logits_are_capped_by_the_head():
    (head,) = steps_of(Graph(caps=(30.0, 30.0)).program(), Head)
    assert head.softcap == 30.0


@pytest.mark.parametrize(("sizes", "row_norm"), [((SIZE, SIZE), False), ((HEADS * SIZE, HEADS * SIZE), True)])
def test_norms_of_a_head_and_of_a_row(sizes, row_norm):
    (attention,) = steps_of(Graph(norm_sizes=sizes).program(), Attention)
    assert (attention.q_norm, attention.k_norm, attention.row_norm) == ("q_norm", "k_norm", row_norm)


def test_a_layer_that_does_not_rotate_has_no_tables():
    options = {"scale": 0.5, "softcap": 20.0, "local_window_size": 7}
    program = Graph(rotary=0, attention=options).program()
    (attention,) = steps_of(program, Attention)
    assert (attention.cos, attention.sin, attention.rotary) == ("", "", 0)
    assert (attention.scale, attention.softcap, attention.window) == (0.5, 20.0, 7)
    assert not any("table" in name for name in program.tensors)


def test_what_has_no_form_is_refused_by_name():
    def said(graph, change=lambda graph: None):
        change(graph)
        with pytest.raises(BuildError) as caught:
            graph.program()
        return str(caught.value)

    # Caps that differ, which is no soft cap.
    assert said(Graph(caps=(30.0, 20.0))) == "the node logits.divided (Div) has no CUDA form"

    # A scale for each column, which no step has.
    columns = np.ones(HIDDEN, np.float32)
    assert said(Graph(embedding_scale=columns)) == "the node embedded.scaled (Mul) has no CUDA form"

    class Twice(Graph):
        """Norms whose output is read again."""

        def added(self, name, x, inputs, stream, output):
            y = super().added(name, x, inputs, stream, output)
            self.native.op("Identity", [y.producer().inputs[1]], f"{name}.again")
            return y

    assert said(Twice(output_norms=True)) == "the node o.normed (RMSNormalization) has no CUDA form"
