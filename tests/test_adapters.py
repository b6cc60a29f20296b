"""The ticket in stock Hugging Face encoders: exact in each of them, saved and loaded again."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import earlybert
import ranks
from earlybert import adapters, dist, state
from earlybert.config import SettingsError
from earlybert.shrink import cut

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 40, "pad_token_id": 0,
}  # fmt: skip
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {
    "BertForMaskedLM": transformers.BertConfig(**SMALL, **QUIET),
    "RobertaForMaskedLM": transformers.RobertaConfig(**{**SMALL, "pad_token_id": 1}, **QUIET),
    "ElectraForPreTraining": transformers.ElectraConfig(**SMALL, **QUIET, embedding_size=16),
    "DistilBertForMaskedLM": transformers.DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=40,
        dropout=0.0, attention_dropout=0.0,
    ),
    "ModernBertForMaskedLM": transformers.ModernBertConfig(
        **SMALL, local_attention=8, global_attn_every_n_layers=2, bos_token_id=1, eos_token_id=2,
        cls_token_id=1, sep_token_id=2,
    ),
    "BertForSequenceClassification": transformers.BertConfig(**SMALL, **QUIET, num_labels=3),
}  # fmt: skip
SETTINGS = {
    "head_ratio": 0.25, "neuron_ratio": 0.23, "minimum_neurons": 1, "neuron_multiple": 1, "penalty": 1e-2,
    "every": 1, "minimum_step": 3, "latest_step": 3,
}  # fmt: skip


def stock(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return getattr(transformers, name)(MODELS[name])


def batch(name, step, rank):
    generator = torch.Generator().manual_seed(100 * step + rank)
    ids = torch.randint(5, 64, (2, 12), generator=generator)
    shape = {"ElectraForPreTraining": (2, 12), "BertForSequenceClassification": (2,)}.get(name)
    labels = ids if shape is None else torch.randint(0, 2, shape, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def logits(model, name):
    inputs = batch(name, 99, 0)
    inputs.pop("labels")
    training = model.training
    model.eval()
    with torch.no_grad():
        found = model(**inputs).logits.float().clone()
    model.train(training)
    return found


def start(name, stage, **changes):
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 10**6},
    }
    return earlybert.initialize(
        model=stock(name),
        config={**config, **changes.pop("config", {})},
        optimizer=changes.pop("optimizer", lambda groups: torch.optim.AdamW(groups, lr=5e-3)),
        early_bird=earlybert.EarlyBird(earlybert.TicketSettings(**{**SETTINGS, **changes})),
    )


def masked_dense(name, weights, engine):
    """The stock model with the coefficients of the drawing step folded in, those of units that went being
    0."""
    model, layers = stock(name), engine.adapter.layers(engine.module.config)
    weights = dict(weights)
    for layer, heads, neurons in zip(layers, engine.ticket.heads, engine.ticket.neurons, strict=True):
        for coefficients, columns, kept in (
            (layer.head_coefficients, layer.head_columns, heads),
            (layer.neuron_coefficients, layer.neuron_columns, neurons),
        ):
            vector = weights.pop(coefficients)
            mask = torch.zeros_like(vector)
            mask[list(kept)] = 1
            size = weights[columns].shape[1] // vector.numel()
            weights[columns] = weights[columns] * (vector * mask).repeat_interleave(size)
    model.load_state_dict(weights, strict=False)
    return model


def draw_and_save(name, folder):
    results = []
    for stage in (0, 1, 2, 3):
        before = logits(stock(name), name)
        engine = start(name, stage)
        searching = logits(engine, name)
        dense, cut_state = {}, engine._cut_state

        def cutting(*arguments, cut_state=cut_state, dense=dense, engine=engine, **options):
            kept = state.whole_parameters(state.read(engine.inner))
            dense.update({name: tensors["master"].clone() for name, tensors in kept})
            return cut_state(*arguments, **options)

        engine._cut_state = cutting
        losses = []
        for step in range(5):
            if step == 3:
                drawn, masked = logits(engine, name), logits(masked_dense(name, dense, engine), name)
            loss = engine(**batch(name, step, dist.rank())).loss
            losses.append(loss.item())
            engine.backward(loss)
            del loss
            engine.step()
        spread = max(float((v - 1).abs().max()) for n, v in dense.items() if n.endswith("coefficients"))
        ended = logits(engine, name)
        shape, loaded = engine.adapter.shape(engine.module), []
        for form in ("compact", "dense"):
            to = Path(folder) / f"{stage}-{form}"
            assert earlybert.save(engine, to, form=form) < 1e-5
            model = earlybert.load(to) if form == "compact" else type(stock(name)).from_pretrained(to)
            loaded.append(logits(model, name))
        results.append((before, searching, drawn, masked, losses, spread, ended, shape, loaded))
        engine.close()
    return results


@pytest.mark.parametrize(
    "name",
    [
        "BertForMaskedLM",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in MODELS if name != "BertForMaskedLM"),
    ],
)
def test_a_stock_model_is_searched_drawn_and_saved_at_every_stage(tmp_path, name):
    of_ranks = ranks.run("test_adapters:draw_and_save", ranks=2, name=name, folder=str(tmp_path))
    for results in of_ranks:
        for before, searching, drawn, masked, losses, spread, ended, shape, loaded in results:
            assert torch.equal(searching, before), "coefficients of 1 change nothing"
            assert spread > 1e-3, "the coefficients have moved, or the comparison says little"
            torch.testing.assert_close(drawn, masked, atol=1e-5, rtol=1e-5)
            assert shape.heads == (3, 3) and sum(shape.neurons) == 96 - round(0.23 * 96)
            assert losses == pytest.approx(results[0][4], abs=1e-4), "every stage trains the same"
            for model in loaded:
                torch.testing.assert_close(model, ended, atol=1e-5, rtol=1e-5)


EXAMPLES = Path(__file__).parent.parent / "scripts" / "examples"


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["bert", "roberta", "electra", "distilbert", "modernbert"])
def test_an_example_trains_draws_saves_and_loads(tmp_path, name):
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) < 60
    words = ["--steps", "20", "--draw", "10", "--out", str(tmp_path / "model")]
    processes = ranks.launch(str(script), words, ranks=2, logs=tmp_path)
    codes, said = [p.wait(timeout=120) for p in processes], (tmp_path / "log-0.txt").read_text()
    assert codes == [0, 0], said
    assert "step 20 loss" in said and "step 10: keep" in said and "loaded again" in said, said


class Pooling(nn.Module):
    """An encoder that nobody knows."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(64, 32)
        self.blocks = nn.ModuleList(nn.ModuleDict({
            "q": nn.Linear(32, 32), "k": nn.Linear(32, 32), "v": nn.Linear(32, 32), "o": nn.Linear(32, 32),
            "up": nn.Linear(32, 48), "down": nn.Linear(48, 32),
        }) for _ in range(2))  # fmt: skip

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            q, k, v = (block[n](x).unflatten(-1, (-1, 8)).transpose(1, 2) for n in "qkv")
            heads = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block["o"](heads)
            x = x + block["down"](torch.relu(block["up"](x)))
        return x


class PoolingConfig(transformers.PretrainedConfig):
    model_type = "pooling"


def dropped(folder):
    """Stock models of 4 layers that lose 2, rewound to their first weights; logits and both exports."""
    found = {}
    for name in ("BertForMaskedLM", "ModernBertForMaskedLM"):
        values = {**MODELS[name].to_dict(), "num_hidden_layers": 4, "layer_types": None}
        if name == "BertForMaskedLM":
            values.pop("layer_types")
        MODELS[name] = type(MODELS[name]).from_dict(values)
        engine = start(name, 2, kind="layerdrop", layer_ratio=0.5, start="rewind")
        for step in range(3):
            loss = engine(**batch(name, step, dist.rank())).loss
            engine.backward(loss)
            del loss
            engine.step()
        whole = stock(name)
        layers = whole.bert.encoder.layer if hasattr(whole, "bert") else whole.model.layers
        kept = torch.nn.ModuleList(layers[i] for i in (0, 2))
        if hasattr(whole, "bert"):
            whole.bert.encoder.layer = kept
        else:
            whole.model.layers = kept
        expected, small = logits(whole, name), logits(engine, name)
        worst = [earlybert.save(engine, Path(folder) / f"{name}-{f}", form=f) for f in ("compact", "dense")]
        loaded = earlybert.load(Path(folder) / f"{name}-compact")
        found[name] = expected, small, worst, loaded.config.num_hidden_layers
        engine.close()
    return found


def test_whole_layers_leave_a_stock_model_too(tmp_path):
    for found in ranks.run("test_adapters:dropped", ranks=2, folder=str(tmp_path)):
        for name, (expected, small, worst, layers) in found.items():
            torch.testing.assert_close(small, expected, atol=1e-5, rtol=1e-5, msg=name)
            assert max(worst) < 1e-5 and layers == 2


def unknown():
    model = Pooling(PoolingConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2))
    model.config._attn_implementation = None
    with pytest.raises(SettingsError, match="model_type 'pooling'.*register") as refused:
        adapters.adapter_of(model)
    assert "head_sections=3" in str(refused.value)
    adapters.register(
        "pooling",
        adapters.Names(
            layer="blocks.{i}", head_rows=("q", "k", "v"), head_columns="o", neuron_rows=("up",),
            neuron_columns="down",
        ),
    )  # fmt: skip
    engine = earlybert.initialize(
        model=model,
        config={"train_micro_batch_size_per_gpu": 2},
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=5e-3),
        early_bird=earlybert.EarlyBird(earlybert.TicketSettings(**SETTINGS)),
    )
    for step in range(4):
        loss = engine(batch("", step, 0)["input_ids"]).square().mean()
        engine.backward(loss)
        engine.step()
    shape = engine.adapter.shape(engine.module)
    engine.close()
    with pytest.raises(SettingsError, match=r"has no Linear 'blocks\.0\.wrong'"):
        adapters.StockAdapter(model, adapters.Names("blocks.{i}", ("q",), "wrong", ("up",), "down"))
    return shape


def test_an_unknown_architecture_is_refused_with_words_that_add_it():
    (shape,) = ranks.run("test_adapters:unknown", ranks=1)
    assert shape.heads == (3, 3) and sum(shape.neurons) == 74


def test_fused_matrices_are_cut_once_in_each_section():
    model = stock("ModernBertForMaskedLM")
    adapter = adapters.adapter_of(model)
    from earlybert.shrink import index_map

    shape = adapter.shape(model)
    cuts = index_map(
        adapter.layers(model.config), ((0, 2), (1,)), ((3, 5), (0, 47)), head_size=shape.head_size,
        head_widths=shape.heads, neuron_widths=shape.neurons,
    )  # fmt: skip
    fused = model.model.layers[0].attn.Wqkv.weight.detach()
    query, key, value = (part.view(4, 8, 32)[[0, 2]].flatten(0, 1) for part in fused.chunk(3))
    assert torch.equal(cut(fused, cuts["model.layers.0.attn.Wqkv.weight"]), torch.cat([query, key, value]))
    gated = model.model.layers[1].mlp.Wi.weight.detach()
    expected = torch.cat([half[[0, 47]] for half in gated.chunk(2)])
    assert torch.equal(cut(gated, cuts["model.layers.1.mlp.Wi.weight"]), expected)


def rates():
    """Learning rates with a scheduler of DeepSpeed's and with one of torch's, with and without a draw."""
    found = []
    warmup = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.01, "warmup_num_steps": 8}}
    for latest in (3, 100):
        for config in ({"scheduler": warmup}, {}):
            engine = start("BertForMaskedLM", 1, latest_step=latest, minimum_step=3, settled_distance=0.0,
                           config=config)  # fmt: skip
            if not config:
                engine.learning_rate = 7e-4  # a loop's own schedule sets it now and then
            seen = []
            for step in range(6):
                loss = engine(**batch("BertForMaskedLM", step, dist.rank())).loss
                engine.backward(loss)
                del loss
                engine.step()
                seen.append([group["lr"] for group in engine.optimizer.param_groups][:2])
            assert (engine.ticket is not None) == (latest == 3)
            found.append(seen)
            engine.close()
    return found


def test_the_learning_rate_and_its_scheduler_go_on_over_the_draw():
    for drawn, drawn_constant, dense, dense_constant in ranks.run("test_adapters:rates", ranks=2):
        assert drawn == dense and dense[0] != dense[5]
        assert drawn_constant == dense_constant == [[7e-4] * 2] * 6


def test_a_config_without_batch_sizes_is_refused_with_the_keys_to_add():
    with pytest.raises(SettingsError, match="add train_micro_batch_size_per_gpu"):
        earlybert.initialize(
            model=stock("BertForMaskedLM"), config="ds_configs/zero2_bf16.json", optimizer=torch.optim.AdamW
        )
