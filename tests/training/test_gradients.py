"""Averages of gradients: by hand, for pruned entries, over a resume, and without a training."""

import pytest
import torch

from grasp_lora.models.example_losses import IGNORED
from grasp_lora.tasks.encoding import Collator
from grasp_lora.training import gradients
from grasp_lora.training.gradients import BETA, GradientAverages, averages_over
from grasp_lora.training.trainer import answer_loss
from training.test_live import live_of, pruned_at
from training.test_search import encoded_rows

COLLATE = Collator(pad_id=0)


def batches(count=4):
    rows = encoded_rows(2 * count, 1)
    return [COLLATE(rows[at : at + 2]) for at in range(0, 2 * count, 2)]


def gradients_by_hand(live, batch):
    """Return name -> gradient by torch.autograd.grad at the weights as they are, hooks not run."""
    batch = dict(batch)
    labels = batch.pop("labels")
    loss = torch.nn.functional.cross_entropy(
        live.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        .logits[:, :-1]
        .flatten(0, 1),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
    )
    copies = list(live.params.values())
    return dict(zip(live.params, torch.autograd.grad(loss, copies), strict=True))


def by_hand(live, rule):
    """Return name -> averages over the batches, by the published formula written out."""
    found = {}
    for batch in batches():
        for name, gradient in gradients_by_hand(live, batch).items():
            if rule == "taylor":
                found[name] = BETA * found.get(name, 0) + (1 - BETA) * gradient
                continue
            sensitivity = (live.params[name].detach() * gradient).abs()
            smooth, uncertain = found.get(name, (0, 0))
            smooth = BETA * smooth + (1 - BETA) * sensitivity
            uncertain = BETA * uncertain + (1 - BETA) * (sensitivity - smooth).abs()
            found[name] = (smooth, uncertain)
    return found


@pytest.mark.parametrize("rule", ["taylor", "taylor-smoothed"])
@pytest.mark.parametrize("kind", ["cat", "linear"])
def test_one_pass_gives_the_averages_of_the_formula(kind, rule):
    live = live_of(kind)
    rows = encoded_rows(8, 1)
    one_by_one = [[COLLATE([row]) for row in rows[at : at + 2]] for at in range(0, 8, 2)]
    found, expected = averages_over(live, rule, one_by_one), by_hand(live, rule)
    together = averages_over(live, rule, [[batch] for batch in batches()])
    assert all(torch.allclose(together[name], one, atol=1e-6) for name, one in found.items())
    assert found.keys() == live.params.keys()
    for name, one in expected.items():
        wanted = one if rule == "taylor" else torch.stack(one)
        assert torch.allclose(found[name], wanted, atol=1e-6), name
    assert all(param.grad is None for param in live.params.values())


def steps(live, averages, some, split=1):
    """Do optimizer steps without an optimizer: the weights stay."""
    averages.begin()
    for batch in some:
        batch = dict(batch)
        labels = batch.pop("labels")
        for _ in range(split):
            answer_loss(
                live.model(**batch), labels, split * int((labels != IGNORED).sum())
            ).backward()
        averages.count_step()
        live.model.zero_grad()
    averages.end()


def test_parts_of_an_accumulated_step_are_one_step():
    live = live_of()
    whole, parts = (
        GradientAverages(live, "taylor-smoothed"),
        GradientAverages(live, "taylor-smoothed"),
    )
    steps(live, whole, batches(), split=1)
    steps(live, parts, batches(), split=2)
    for name, one in whole.averages.items():
        assert torch.allclose(one, parts.averages[name], atol=1e-6)


def test_pruned_entries_are_scored_by_their_stashed_values_though_they_get_no_gradient():
    live = live_of()
    live.commit(pruned_at(live, 0.5))
    averages = GradientAverages(live, "taylor-smoothed")
    steps(live, averages, batches(1))
    live.release()  # the gradients by hand are those of pruned entries too
    for name, gradient in gradients_by_hand(live, batches(1)[0]).items():
        smooth = (1 - BETA) * (live.effective(name) * gradient).abs()
        assert torch.allclose(averages.averages[name][0], smooth, atol=1e-6)
        assert bool(averages.averages[name][0][~live.keep(name)].any())


def test_a_state_goes_on_where_it_was_kept():
    live = live_of()
    whole, first = (
        GradientAverages(live, "taylor-smoothed"),
        GradientAverages(live, "taylor-smoothed"),
    )
    steps(live, whole, batches())
    steps(live, first, batches()[:2])
    second = GradientAverages(live, "taylor-smoothed")
    given = second.averages
    second.load_state(*first.state())
    steps(live, second, batches()[2:])
    assert given is second.averages, "the search holds on to them"
    for name, one in whole.averages.items():
        assert torch.equal(one, second.averages[name])


def test_nothing_is_watched_after_the_end():
    live = live_of()
    averages = GradientAverages(live, "taylor")
    steps(live, averages, [])
    gradients_by_hand(live, batches(1)[0])
    averages.count_step()
    assert averages.averages == {}


def test_several_processes_average_their_gradients_and_all_take_part(monkeypatch):
    live, reduced = live_of(), []

    def as_if_another_process_had_three_times_the_gradient(one):
        reduced.append(one)
        one *= 4

    alone, shared = GradientAverages(live, "taylor"), GradientAverages(live, "taylor")
    steps(live, alone, batches(1))
    first = next(iter(live.params))
    with monkeypatch.context() as patch:
        patch.setattr(gradients.distributed, "is_initialized", lambda: True)
        patch.setattr(gradients.distributed, "get_world_size", lambda: 2)
        patch.setattr(
            gradients.distributed, "all_reduce", as_if_another_process_had_three_times_the_gradient
        )
        steps(live, shared, batches(1))
        shared._see(first, torch.ones_like(live.params[first]))
        shared.count_step()
    assert len(reduced) == 2 * len(live.params), "also those without a gradient of their own"
    for name, one in alone.averages.items():
        expected = BETA * 2 * one + ((1 - BETA) * 2 if name == first else 0)
        assert torch.allclose(shared.averages[name], expected, atol=1e-6)
