"""What tasks add reaches Avalanche's loggers."""

from __future__ import annotations

from avalanche.training.plugins import EvaluationPlugin

from avalanche_gradproj.metrics import growth_metrics, memory_metrics
from tests.plugins.halrp_setup import benchmark, learner, network


def test_growth_and_ranks_are_emitted_after_each_experience():
    strategy = learner(network(), evaluator=EvaluationPlugin(*growth_metrics(), memory_metrics()))
    for number, experience in enumerate(benchmark((5, 2, 9)).train_stream):
        strategy.train(experience)
        prefix, core = f"train_phase/train_stream/Exp{number:03d}", strategy.plugin.method
        found = {name: value for name, value in strategy.evaluator.get_last_metrics().items() if prefix in name}
        expected = {f"Growth/{prefix}/all": core.growth}
        for label, record in core.ledger.records.items():
            expected[f"Growth/{prefix}/of_Task{label:03d}"] = record.numbers / core.ledger.base
        for layer, rank in (core.ledger.records[experience.task_label].ranks if number else {}).items():
            expected[f"PerturbationRank/{prefix}/{layer}"] = rank
        expected[f"BytesHeld/{prefix}/all"] = sum(record.stored_bytes for record in core.ledger.records.values())
        for place, record in enumerate(core.ledger.records.values()):
            expected[f"BytesHeld/{prefix}/of_Exp{place:03d}"] = record.stored_bytes
        assert found == expected
    assert core.growth > 0
