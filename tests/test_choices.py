"""What a draw may be asked for: baselines, rewinding, re-warm-up, damping; each against a reference."""

import copy
from pathlib import Path

import pytest
import torch

import ranks
import tiny
from earlybert import baselines, checkpoint, cutting, dist, state
from earlybert.adapters import bert_layers, enable_checkpointing
from earlybert.engine import initialize
from earlybert.model import EarlyBertForPreTraining
from earlybert.progress import EarlyBird
from earlybert.shrink import cut
from earlybert.ticket import draw

WHAT = {"experiment": "e", "corpus": "c", "precision": "fp32", "trainer": {"sums": {}}, "keep": 2}


def masters(engine):
    found = state.whole_parameters(state.read(engine.inner))
    return {name: tensors["master"].clone() for name, tensors in found}


def bare(**changes):
    return tiny.config(coefficients="none", **changes)


def baseline_draws(stage):
    """The tickets of the three baselines, the weights before and after the draw, and logits."""
    results = {}
    for kind, layers in (("random", 2), ("magnitude", 2), ("layerdrop", 6)):
        shape = bare(num_hidden_layers=layers)
        settings = tiny.settings(kind=kind, minimum_step=3, latest_step=3, layer_ratio=1 / 3, layerdrop=0.5)
        engine = tiny.engine(stage, "fp32", settings, model_config=shape)
        tiny.train(engine, range(2))
        before, cut_state = {}, engine._cut_state

        def cutting_(*arguments, engine=engine, before=before, cut_state=cut_state, **options):
            before.update(masters(engine))
            return cut_state(*arguments, **options)

        engine._cut_state = cutting_
        tiny.train(engine, range(2, 3))
        assert engine.ticket is not None and not engine.searching
        after = masters(engine)
        losses = tiny.train(engine, range(3, 5))
        results[kind] = (engine.ticket, before, after, losses, engine.module.config.to_dict())
        engine.close()
    return results


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.thorough)])
def test_the_baselines_are_drawn_by_the_same_hook(stage):
    one, two = ranks.run("test_choices:baseline_draws", ranks=2, stage=stage)
    for kind in one:
        assert one[kind][0] == two[kind][0] and one[kind][3] == two[kind][3], "the ranks agree"
    widths, settings = {"heads": [4, 4], "neurons": [48, 48]}, tiny.settings()

    ticket, before, after, _, _ = one["random"]
    scores = {
        seed: {f: baselines.random_scores(w, seed=seed, family=f, draw=0) for f, w in widths.items()}
        for seed in (7, 8)
    }
    expected = {seed: draw(s["heads"], s["neurons"], settings=settings, step=3) for seed, s in scores.items()}
    assert (ticket.heads, ticket.neurons) == (expected[7].heads, expected[7].neurons)
    assert ticket.neurons != expected[8].neurons, "another seed, another ticket"
    cuts = tiny.cuts(ticket.heads, ticket.neurons)
    assert all(torch.equal(after[name], cut(value, cuts.get(name))) for name, value in before.items())

    ticket, before, after, _, _ = one["magnitude"]
    norms = {"heads": [], "neurons": []}
    for layer in bert_layers(2):
        for family, size, rows, columns in (
            ("heads", 8, layer.head_rows, layer.head_columns),
            ("neurons", 1, layer.neuron_rows, layer.neuron_columns),
        ):
            parts = [before[row.name].reshape(-1, size, *before[row.name].shape[1:]) for row in rows]
            parts.append(before[columns].T.reshape(-1, size, 32))
            norms[family].append(torch.stack([p.flatten(1).double().square().sum(1) for p in parts]).sum(0))
    expected = draw(norms["heads"], norms["neurons"], settings=settings, step=3)
    assert (ticket.heads, ticket.neurons) == (expected.heads, expected.neurons)

    ticket, before, after, losses, values = one["layerdrop"]
    assert [bool(heads) for heads in ticket.heads] == [True, False, True, True, False, True]
    assert values["num_hidden_layers"] == 4 and all(loss < 10 for loss in losses)
    stays = {old: new for new, old in enumerate((0, 2, 3, 5))}
    for name, value in before.items():
        if ".layer." in name:
            head, _, rest = name.partition(".layer.")
            index, _, tail = rest.partition(".")
            if int(index) not in stays:
                continue
            name = f"{head}.layer.{stays[int(index)]}.{tail}"
        assert torch.equal(after[name], value), name


def dropping():
    """Outputs of a model whose every layer is passed by, and of one whose layers all stay."""
    model = tiny.seeded_model(bare(), seed=7)
    inputs = tiny.batch(0, 0)
    model.eval()
    plain = model(**inputs).prediction_logits
    baselines.drop_layers(model, bert_layers(2), probability=1.0)
    evaluated = model(**inputs).prediction_logits
    model.train()
    passed = model(**inputs)
    passed.loss.backward()
    model.eval()
    model.bert.encoder.layer = torch.nn.ModuleList()
    return plain, evaluated, passed.prediction_logits, model(**inputs).prediction_logits, model


def test_a_layer_that_is_passed_by_gives_its_input_and_a_gradient_of_zero():
    plain, evaluated, passed, without, _ = dropping()
    assert torch.equal(plain, evaluated), "evaluation uses every layer"
    torch.testing.assert_close(passed, without)
    assert not torch.allclose(plain, passed)


def test_each_of_two_passes_before_a_backward_pass_has_its_own_coins_and_so_has_a_copy():
    model = tiny.seeded_model(bare(), seed=7).train()
    baselines.drop_layers(model, bert_layers(2), probability=0.5)
    torch.manual_seed(4)
    apart = [gradients_of(model, model(**tiny.batch(0, i)).loss) for i in range(4)]
    torch.manual_seed(4)
    together = gradients_of(model, sum(model(**tiny.batch(0, i)).loss for i in range(4)))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, sum(found[name] for found in apart), msg=name)
    copied = copy.deepcopy(model)
    losses = {round(copied(**tiny.batch(0, 0)).loss.item(), 6) for _ in range(20)}
    assert 2 <= len(losses) <= 4, "two layers, each there or not"


def test_a_layer_that_is_computed_again_finds_the_coin_of_its_pass():
    model = tiny.seeded_model(bare(), seed=7).train()
    baselines.drop_layers(model, bert_layers(2), probability=0.5)
    found = []
    for _ in range(2):
        torch.manual_seed(4)
        found.append([gradients_of(model, model(**tiny.batch(0, i)).loss) for i in range(6)])
        enable_checkpointing(model)
    for plain, again in zip(*found, strict=True):
        assert plain.keys() == again.keys()
        for name, gradient in plain.items():
            assert torch.equal(again[name], gradient), name


def gradients_of(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def rewound(stage, folder):
    """Weights of step 2, those after the draw at step 4, and the same with a resume at step 3."""
    settings = tiny.settings(start="rewind", rewind_step=2, coefficients="fold", draws=2)
    results = []
    for resumed in (False, True):
        engine = tiny.engine(stage, "fp32", settings)
        tiny.train(engine, range(2))
        at_two = masters(engine)
        tiny.train(engine, range(2, 3))
        if resumed:
            checkpoint.save(engine, Path(folder), step=3, stage=stage, **WHAT)
            progress = engine.progress
            engine.close()
            dist.barrier()
            engine = tiny.engine(stage, "fp32", settings)
            engine.progress = type(progress).from_json(progress.to_json(), where="test")
            found = checkpoint.newest_good(Path(folder))
            assert found is not None and found.manifest.state["anchor"]
            checkpoint.load(engine, found)
        tiny.train(engine, range(3, 4))
        first = masters(engine), engine.ticket
        losses = tiny.train(engine, range(4, 9))
        results.append((at_two, *first, engine.ticket, losses, masters(engine)))
        assert engine.anchor is None, "given up after the last draw"
        engine.close()
    return results


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_a_rewind_brings_back_the_weights_of_its_step_over_a_resume_too(tmp_path, stage):
    for whole, resumed in ranks.run("test_choices:rewound", ranks=2, stage=stage, folder=str(tmp_path)):
        at_two, after, ticket, second, losses, ended = whole
        cuts = tiny.cuts(ticket.heads, ticket.neurons)
        layers = bert_layers(2)
        expected = dict(at_two)
        for layer in layers:  # the coefficients of step 2 are folded into the matrices of step 2
            for coefficients, columns in (
                (layer.head_coefficients, layer.head_columns),
                (layer.neuron_coefficients, layer.neuron_columns),
            ):
                vector = at_two[coefficients]
                size = at_two[columns].shape[1] // vector.numel()
                expected[columns] = at_two[columns] * vector.repeat_interleave(size)
                expected[coefficients] = torch.ones_like(vector)
        for name, value in expected.items():
            torch.testing.assert_close(after[name], cut(value, cuts.get(name)), rtol=0, atol=0, msg=name)
        assert second.step == 8
        assert resumed[2] == ticket and resumed[3] == second and resumed[4] == losses
        assert all(torch.equal(resumed[5][name], value) for name, value in ended.items())


def warmed():
    """Learning rates inside and outside of each step."""
    engine = tiny.engine(2, "bf16", tiny.settings(rewarmup_steps=4))
    inside, outside = [], []
    for step in range(10):
        base = engine.optimizer.optimizer
        seen = set()
        hook = base.register_step_pre_hook(lambda own, *_, seen=seen: seen.add(own.param_groups[0]["lr"]))
        before = engine.warming
        tiny.train(engine, range(step, step + 1))
        inside += sorted(seen)
        outside.append((before, engine.learning_rate))
        hook.remove()
    engine.close()
    return inside, outside


def test_after_the_draw_the_learning_rate_rises_again_inside_the_steps_only():
    for inside, outside in ranks.run("test_choices:warmed", ranks=2):
        factors = [1.0] * 4 + [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
        assert inside == pytest.approx([tiny.RATE * f for f in factors])
        assert [f for f, _ in outside] == factors and {lr for _, lr in outside} == {tiny.RATE}


def damped(stage):
    settings = tiny.settings(damping=0.25, every=2, minimum_step=9, latest_step=9)
    engine = tiny.engine(stage, "fp32", settings)
    tiny.train(engine, range(3))
    engine.reopen(micro_batch=tiny.MICRO, accumulation=tiny.ACCUMULATION)
    tiny.train(engine, range(3, 6))
    got = masters(engine)
    looks = [
        (engine.progress.search.heads.kept(look), engine.progress.search.neurons.kept(look))
        for look in range(2)
    ]
    engine.close()
    return got, looks


@pytest.mark.parametrize("stage", [0, 3])
def test_damping_scales_the_gradients_of_the_units_outside_the_newest_mask(stage):
    for got, looks in ranks.run("test_choices:damped", ranks=2, stage=stage):
        model = tiny.seeded_model(tiny.config(), seed=7)
        optimizer, hooks = tiny.reference_optimizer(model), []
        names = dict(model.named_parameters())
        shape = cutting.Shape((4, 4), (48, 48), 8, "train")
        for step in range(6):
            if step in (2, 4):
                for hook in hooks:
                    hook.remove()
                heads, neurons = looks[step // 2 - 1]
                factors = cutting.dampers(bert_layers(2), shape, heads=heads, neurons=neurons, factor=0.25)
                assert factors and not any(name.endswith("coefficients") for name in factors)
                hooks = []
                for name, (dim, vector) in factors.items():
                    view = vector.view([-1 if d == dim else 1 for d in range(names[name].ndim)])
                    hooks.append(names[name].register_hook(lambda g, view=view: g * view))
            tiny.reference_step(model, optimizer, step, ranks=2, penalty=1e-2)
        for name, value in names.items():
            torch.testing.assert_close(got[name], value.detach(), atol=3e-6, rtol=1e-5, msg=name)


def test_without_damping_the_same_steps_end_elsewhere():
    (got, _), (other, _) = ranks.run("test_choices:damped", ranks=1, stage=0)[0], undamped()
    name = "bert.encoder.layer.0.output.dense.weight"
    assert not torch.allclose(got[name], other[name], atol=3e-6)


def undamped():
    model = tiny.seeded_model(tiny.config(), seed=7)
    optimizer = tiny.reference_optimizer(model)
    for step in range(6):
        tiny.reference_step(model, optimizer, step, ranks=1, penalty=1e-2)
    return {name: value.detach() for name, value in model.named_parameters()}, None


def counted():
    """Widths under an absolute count, a budget and global heads, over two draws."""
    found = []
    for changes in (
        {"heads_kept": 2, "neurons_kept": 24, "neuron_scope": "layer", "draws": 2},
        {"budget": 0.5, "draws": 2},
        {"head_scope": "global", "heads_kept": 5, "head_multiple": 1},
    ):
        settings = tiny.settings(**changes)
        engine = tiny.engine(2, "fp32", settings)
        tiny.train(engine, range(8))
        shapes = [(tuple(map(len, t.heads)), tuple(map(len, t.neurons))) for t in engine.progress.tickets]
        work = engine.adapter.work(engine.module)
        found.append((shapes, work.of(*shapes[-1]) / work.of((4, 4), (48, 48))))
        engine.close()
    return found


def test_counts_and_budgets_are_reached_by_the_last_draw():
    counts, budget, heads = ranks.run("test_choices:counted", ranks=1)[0]
    assert counts[0] == [((3, 3), (34, 34)), ((2, 2), (24, 24))], "geometrically: 4, 2.83, 2 and 48, 33.9, 24"
    assert len(budget[0]) == 2 and 0.4 < budget[1] <= 0.5
    assert sum(heads[0][0][0]) == 5 and min(heads[0][0][0]) >= 1


def test_the_model_class_of_a_bare_baseline_needs_no_coefficients():
    assert isinstance(tiny.seeded_model(bare(), seed=1), EarlyBertForPreTraining)
    assert EarlyBird(tiny.settings(kind="random")).settings.searches is False and callable(initialize)
