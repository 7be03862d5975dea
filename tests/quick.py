"""What ``make quick`` runs: of every package of ``trady/`` something, in about a minute."""

from __future__ import annotations

#: From a package to what of the tests looks at it.
QUICK: dict[str, tuple[str, ...]] = {
    "analysis": ("test_trace.py",),
    "calls": ("test_composites.py::test_products_with_a_weight_are_linear_layers",),
    "channels": ("test_policies.py",),
    "cli": ("test_study_command.py::test_what_cannot_be_is_refused_at_once",),
    "compare": ("test_comparison.py",),
    "estimates": ("test_fit.py::test_the_search_finds_what_trying_everything_finds",),
    "evidence": ("test_velocity.py::test_a_neuron_that_does_not_move_has_no_velocity",),
    "integrations": ("test_transformers_trainer.py::test_it_trains_what_a_loop_of_ones_own_trains",),
    "interception": ("test_interception.py", "test_optimizer_state.py"),
    "memory": ("test_ledger.py",),
    "model": ("test_sample_axes.py::test_where_samples_lie",),
    "ops": ("test_ops.py::test_a_layer_has_the_output_and_the_gradients_of_its_dense_twin",),
    "optim": ("test_optim_clipping.py",),
    "outcome": ("test_run_page.py::test_the_page_says_what_the_files_say",),
    "planning": ("test_budget.py",),
    "policies": ("test_policies.py",),
    "prediction": ("test_predict.py::test_inputs_and_scores_are_those_of_the_evaluation_bit_for_bit",),
    "process": ("test_process.py::test_answers_are_those_of_the_real_module",),
    "quantized": ("test_quantized.py::test_selected_channels_have_the_gradients_of_the_dense_model",),
    "ranking": ("test_ranking.py",),
    "records": ("test_checkpoint.py",),
    "report": ("test_report_page.py",),
    "search": ("test_search.py::test_evolution_finds_what_trying_everything_finds",),
    "simulation": ("test_tuner_budgets.py::test_the_simulated_step_is_the_measured_one_to_the_byte",),
    "study": ("test_study_command.py::test_what_cannot_be_is_refused_at_once",),
    "trace": ("test_trace.py",),
    "training": ("test_data.py", "test_checkpoint.py"),
    "tuner": (
        "test_tuner_checkpoints.py::test_base_and_delta_are_the_finished_model_bit_for_bit",
        "test_optimizer_state.py",
    ),
}

SELECTED = tuple(dict.fromkeys(f"tests/{test}" for tests in QUICK.values() for test in tests))

if __name__ == "__main__":
    print(*SELECTED)  # noqa: T201
