"""Errors that a change could bring into the core, and for each the tests that must notice it.

Each is a piece of the program that is replaced by a wrong one. None ends in an exception where the code runs: the
numbers are wrong, or a promise is broken. The pieces must occur exactly once in their file.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One error: ``old`` becomes ``new`` in ``file``."""

    name: str  # what goes wrong, as docs/reliability.md tells it
    file: str  # inside lisa_dist/
    old: str
    new: str
    test: str  # the test that notices, inside tests/


TRAINING, METHODS = "distributed/test_training.py", "distributed/test_methods.py"
SAVING = "distributed/test_checkpoint_saving.py"
THREE_PERIODS = f"{TRAINING}::test_three_periods_equal_plain_pytorch"
RESUMED = "method/optim/test_active_optimizer.py::test_state_that_waits_is_in_the_checkpoint"
RESIDENT = "sharding/test_resident.py"
STREAMED = "sharding/test_streamed.py::test_training_is_that_of_the_resident_store"
MEMORY_LAW = f"{TRAINING}::test_memory_law_holds_on_every_rank_after_every_switch[2]"

WRITTEN = "failure = agree(lambda: files.update(_write_own_files(snapshot, unfinished)))"

STEP = [
    Mutation(
        "the optimizer makes no step",
        "method/optim/active_optimizer.py",
        "self._stepper.step()",
        "pass",
        f"{TRAINING}::test_every_family_trains_two_periods[llama]",
    ),
    Mutation(
        "no optimizer step, seen with every sampler",
        "method/optim/active_optimizer.py",
        "self._stepper.step()",
        "pass",
        f"{METHODS}::test_every_sampler_goes_with_every_update[full_rank]",
    ),
    Mutation(
        "gradients are divided by the number of ranks",
        "sharding/wrapping_policy.py",
        "module.set_gradient_divide_factor(1.0)",
        "module.set_gradient_divide_factor(float(mesh.size()))",
        "distributed/test_loss_head.py::test_loss_and_gradients_equal_one_plain_process[llama]",
    ),
    Mutation(
        "gradients are clipped before they are divided by the label tokens",
        "method/optim/clipping.py",
        "max_norm / (norm.double() + 1e-6)",
        "max_norm / (label_tokens * norm.double() + 1e-6)",
        f"{THREE_PERIODS}[1]",
    ),
    Mutation(
        "a rank clips by the norm of its own shards",
        "method/optim/clipping.py",
        "norms = _over_ranks(own, gradients[0])",
        "norms = own",
        f"{THREE_PERIODS}[2]",
    ),
    Mutation(
        "the loss is divided by a rank's own label tokens",
        "training/step.py",
        "step_clipped(train_module, rates, loss_sum, max(divisor, 1), observed)",
        "step_clipped(train_module, rates, loss_sum, max(own_divisor * dims.num_ranks, 1), observed)",
        f"{THREE_PERIODS}[2]",
    ),
    Mutation(
        "gradients of a replica are not summed with those of the others",
        "sharding/wrapping_policy.py",
        "module.set_force_sum_reduction_for_comms(True)",
        "module.set_force_sum_reduction_for_comms(True), module.set_requires_all_reduce(False)",
        f"{THREE_PERIODS}[2 x 2]",
    ),
    Mutation(
        "the learning rate is that of the next step",
        "training/step.py",
        "    rates = learning_rates(config.scheduler, config.optimizer, step, max_steps)",
        "    rates = learning_rates(config.scheduler, config.optimizer, step + 1, max_steps)",
        f"{THREE_PERIODS}[1]",
    ),
    Mutation(
        "warm-up begins at zero, a step late",
        "method/optim/schedule.py",
        "return base * (step + 1) / config.warmup_steps",
        "return base * step / config.warmup_steps",
        "method/optim/test_schedule.py",
    ),
    Mutation(
        "a step that is not finite is made all the same",
        "method/optim/active_optimizer.py",
        "stepper.found_inf = None if finite is None else (~finite).float()",
        "stepper.found_inf = None",
        "faults/test_bad_steps.py::test_a_left_out_step_changes_nothing",
    ),
    Mutation(
        "dropout is not seeded anew at each step",
        "training/step.py",
        "torch.manual_seed(hash((config.train.seed, step, dims.data_rank)) % 2**63)",
        "pass",
        RESUMED,
    ),
    Mutation(
        "a signal is ignored",
        "training/loop.py",
        "stop = stop_requested() or run.checkpoints.must_stop()",
        "stop = run.checkpoints.must_stop()",
        "launching/sweeps/test_run.py::test_failed_and_stopped_jobs_go_on_when_the_sweep_is_run_again",
    ),
    Mutation(
        "after a spike the run goes back and trains on the same batch again",
        "training/recovery.py",
        "progress.left_out.append(stretch)",
        "progress.left_out.append([0, 0])",
        "faults/test_bad_steps.py::test_a_spike_takes_the_run_back_without_its_batch",
    ),
]

SWITCH = [
    Mutation(
        "the state of a frozen block is not released",
        "method/optim/active_optimizer.py",
        "self._stepper.state.pop(entry.stepped, None)",
        "pass",
        "distributed/test_memory_law.py::test_every_byte_is_explained_and_nothing_grows_over_ten_periods",
    ),
    Mutation(
        "a block that is drawn twice running starts anew",
        "method/switch.py",
        "leaving = [part for part in before if part not in after]\n"
        "    entering = [part for part in after if part not in before]",
        "leaving, entering = before, after",
        f"{THREE_PERIODS}[1]",
    ),
    Mutation(
        "other blocks are thawed and frozen than were drawn",
        "method/switch.py",
        "return update.trainable_parameters(store.parameters_of(part))",
        "part = f'block:{len(store.layers.blocks) - 1 - int(part[6:])}'\n"
        "        return update.trainable_parameters(store.parameters_of(part))",
        f"{THREE_PERIODS}[1]",
    ),
    Mutation(
        "a frozen block goes on having gradients",
        "sharding/sharded.py",
        "fsdp2.replace_shard(fsdp_param, shard, requires_grad=trained)",
        "fsdp2.replace_shard(fsdp_param, shard, requires_grad=True)",
        MEMORY_LAW,
    ),
    Mutation(
        "masters are rounded to nearest when their block is frozen",
        "sharding/rounding.py",
        "return round_stochastically(values, seed)",
        "return values.to(dtype)",
        "distributed/test_memory_law.py::test_stochastic_rounding_keeps_updates_that_nearest_loses",
    ),
    Mutation(
        "the rounding noise is the same in every period",
        "sharding/rounding.py",
        "keyed_seed(seed, period, name, shard_index)",
        "keyed_seed(seed, name, shard_index)",
        "sharding/test_rounding.py::test_noise_depends_on_every_part_of_its_key",
    ),
    Mutation(
        "every rank draws for itself",
        "method/switch.py",
        "drawn = self.sampler.draw(period) if distributed.is_main() else None\n"
        "        message = distributed.broadcast_object(None if drawn is None else (drawn, checksum(period, drawn)))",
        "drawn = self.sampler.draw(period)\n        message = (drawn, checksum(period, drawn))",
        f"{TRAINING}::test_ranks_seeded_differently_agree_on_every_set",
    ),
    Mutation(
        "FSDP2 keeps the dtypes that it read at first",
        "sharding/fsdp2.py",
        "group._init_mp_dtypes()",
        "pass",
        f"{TRAINING}::test_bf16_storage_follows_the_fp32_losses_and_reduces_in_fp32",
    ),
    Mutation(
        "masters that were stepped are not put into the shards",
        "method/optim/active_optimizer.py",
        "self.after_step([name for name, entry in trained.items() if id(entry.stepped) not in written])",
        "pass",
        "sharding/test_masters.py::test_training_equals_that_with_masters_on_every_replica[full_rank]",
    ),
    Mutation(
        "of several micro-batches the last gradient alone reaches the masters",
        "sharding/masters.py",
        "local_shard(master.grad).add_(local_shard(own))",
        "master.grad = own",
        "sharding/test_masters.py::test_training_equals_that_with_masters_on_every_replica[full_rank]",
    ),
    Mutation(
        "masters of whole weights are not put into the copies that the model computes with",
        "sharding/resident.py",
        "torch._foreach_copy_(copies, [self.master(name).detach() for name in apart])",
        "pass",
        f"{RESIDENT}::test_numbers_are_those_of_fsdp2_and_checkpoints_go_both_ways[owlore]",
    ),
    Mutation(
        "gradients of whole weights are not summed over the replicas",
        "sharding/resident.py",
        "if self._sums is None or not self._deferred:",
        "if self._sums is None:",
        f"{RESIDENT}::test_two_replicas_equal_plain_pytorch_and_each_other",
    ),
    Mutation(
        "a slot is handed back before its block has computed",
        "sharding/streamed.py",
        "self._hand_out(there)\n",
        "self._hand_out(there)\n        self.slots.leave(slot)\n",
        f"{STREAMED}[lisa, frozen ends, tied]",
    ),
    Mutation(
        "a block computes in a slot that is not filled yet",
        "sharding/link.py",
        "self.link.wait(slot)",
        "pass",
        f"{STREAMED}[lisa, frozen ends, tied]",
    ),
    Mutation(
        "slots hold what lay in host memory before a switch",
        "sharding/streamed.py",
        "self.slots.forget()\n        for name in names:",
        "for name in names:",
        f"{STREAMED}[lisa]",
    ),
    Mutation(
        "adapters are no inputs of the block that is computed again",
        "sharding/streamed.py",
        "names = self._trained_in(index)",
        "names: list[str] = []",
        f"{STREAMED}[lora, frozen ends]",
    ),
    Mutation(
        "a block that is computed again draws other random numbers",
        "sharding/recomputed.py",
        "torch.set_rng_state(states[0])",
        "pass",
        f"{STREAMED}[gpt2 with dropout]",
    ),
    Mutation(
        "where micro-batches pass a block together, all have the same dropout",
        "sharding/block_major.py",
        "hash((seed, micro_batch, block))",
        "hash((seed, block))",
        "sharding/test_block_major.py::test_dropout_is_keyed_by_step_micro_batch_and_block",
    ),
    Mutation(
        "of the inputs that wait where micro-batches pass a block together, only one micro-batch's are reckoned with",
        "sharding/memory_policy.py",
        "(micro_batches * (blocks + 2) + passing)",
        "(blocks + 2 + passing)",
        "sharding/test_block_major.py::"
        "test_as_many_blocks_stay_on_the_device_as_leave_room_for_the_inputs_of_all_micro_batches",
    ),
    Mutation(
        "inputs of blocks that go to host memory are given up before they are there",
        "sharding/waiting_states.py",
        "self.link.wait_sent(sent)",
        "pass",
        "sharding/test_block_major.py::test_states_lie_on_the_device_while_they_are_on_their_way",
    ),
    Mutation(
        "frozen blocks that stay on the device take no memory of it",
        "sharding/memory_policy.py",
        "rest -= sizes[block] + extra.get(block, 0)",
        "rest -= extra.get(block, 0)",
        "sharding/test_streamed.py::test_as_many_frozen_blocks_stay_on_the_device_as_fit_with_the_same_numbers",
    ),
    Mutation(
        "blocks that stay on the device are loaded into host memory first",
        "sharding/streamed.py",
        "stays = trained or not self._may_stream(name) or self._block_of(name) in self._kept",
        "stays = trained or not self._may_stream(name)",
        "sharding/test_streamed.py::test_what_stays_on_the_device_needs_no_host_memory[ends train]",
    ),
    Mutation(
        "where masters lie apart, a block that enters has its shards stepped instead",
        "method/switch.py",
        "store.master(name) for name in names",
        "store.parameter(name) for name in names",
        "sharding/test_masters.py::test_training_equals_that_with_masters_on_every_replica[lora_fa]",
    ),
    Mutation(
        "the gradient of B in LoRA-FA is not corrected",
        "method/updates/lora.py",
        "gradient.copy_(gradient.float() @ self.corrections[name].to(gradient.device))",
        "pass",
        f"{METHODS}::test_lora_fa_equals_its_formula",
    ),
    Mutation(
        "GaLore's projectors are found once and never again",
        "method/updates/low_rank.py",
        "entry.step % self.config.refresh_every == 0",
        "entry.step == 0",
        f"{METHODS}::test_galore_equals_its_formula",
    ),
    Mutation(
        "the outlier probe counts padding",
        "method/probes.py",
        'up_to_last_label(micro_batch["labels"])',
        'torch.ones_like(micro_batch["labels"])',
        "distributed/test_probes.py::test_probes_equal_plain_computation[1-1-None]",
    ),
]

DATA = [
    Mutation(
        "padding has labels",
        "data/batches.py",
        '"labels": np.full((len(chosen), tokens), UNTRAINED, dtype=np.int64),',
        '"labels": np.full((len(chosen), tokens), self.pad_token_id, dtype=np.int64),',
        "data/test_batches.py::test_padding",
    ),
    Mutation(
        "every rank takes the same micro-batches",
        "data/batches.py",
        "place = turn * self.num_ranks + self.rank",
        "place = turn * self.num_ranks",
        "data/test_batches.py::test_micro_batches_are_dealt_in_turn",
    ),
    Mutation(
        "every epoch has the same order",
        "data/batches.py",
        "np.random.default_rng([self.seed, epoch])",
        "np.random.default_rng([self.seed, 0])",
        "data/test_batches.py::test_order_follows_the_seed_and_changes_with_the_epoch",
    ),
    Mutation(
        "the label at position 0 is counted as a label token",
        "data/batches.py",
        'return int((micro_batch["labels"][:, 1:] != UNTRAINED).sum())',
        'return int((micro_batch["labels"] != UNTRAINED).sum())',
        f"{THREE_PERIODS}[1]",
    ),
    Mutation(
        "the token before an answer is trained",
        "data/encode.py",
        "trained |= (last > start) & (first < end)",
        "trained |= (last >= start) & (first < end)",
        "data/test_encode.py::test_exactly_answers_and_their_end_are_trained",
    ),
    Mutation(
        "turns that are marked untrained are trained",
        "data/encode.py",
        "spans = [span for index, span in answers.spans.items() if index not in conversation.untrained]",
        "spans = list(answers.spans.values())",
        "data/test_encode.py::test_answers_that_are_marked_untrained_carry_no_loss",
    ),
    Mutation(
        "a text that ends with EOS gets a second one",
        "data/encode.py",
        "if not text.rstrip().endswith(eos):",
        "if True:",
        "data/test_encode.py::test_a_text_that_has_bos_and_eos_already_gets_no_second_one",
    ),
    Mutation(
        "positions of packed samples run on",
        "data/sequences.py",
        "np.concatenate([np.arange(len(sample_labels), dtype=np.int64) for sample_labels in labels])",
        "np.arange(sum(map(len, labels)), dtype=np.int64)",
        "data/test_packing.py::test_no_token_of_a_packed_sequence_sees_another_sample",
    ),
    Mutation(
        "the last token of a packed sample has to predict the first of the next",
        "data/sequences.py",
        "sample_labels[:1] = UNTRAINED",
        "pass",
        "data/test_packing.py::test_no_token_of_a_packed_sequence_sees_another_sample",
    ),
    Mutation(
        "rows held out for validation are trained on too",
        "data/prepare.py",
        "rows.select(np.sort(order[count:]))",
        "rows.select(np.sort(order))",
        "data/test_prepare.py::test_fraction_held_out",
    ),
    Mutation(
        "a token is trained to predict itself",
        "objectives/chunked_head.py",
        "return F.pad(labels[:, 1:], (0, 1), value=UNTRAINED)",
        "return labels",
        "distributed/test_loss_head.py::test_loss_and_gradients_equal_one_plain_process[llama]",
    ),
]

CHECKPOINT = [
    Mutation(
        "a resumed run has lost its moments",
        "checkpoint/restore.py",
        "_read_tensors(moments, checkpoint / MOMENTS)",
        "pass",
        RESUMED,
    ),
    Mutation(
        "a resumed run has lost its step counts",
        "checkpoint/restore.py",
        'train_module.optimizer.set_step_counts(state["optimizer_steps"])',
        "pass",
        RESUMED,
    ),
    Mutation(
        "a resumed run has lost the sampler's state",
        "checkpoint/restore.py",
        'train_module.sampler.load_state_dict(state["sampler"])',
        "pass",
        RESUMED,
    ),
    Mutation(
        "a resumed run begins the data anew",
        "checkpoint/restore.py",
        "if not changed_data(progress.data, data):\n        return progress",
        "if not changed_data(progress.data, data):\n        return replace(progress, sequences=0)",
        RESUMED,
    ),
    Mutation(
        "a run is resumed on other data without a word",
        "checkpoint/restore.py",
        "if not changed_data(progress.data, data):",
        "if True:",
        "distributed/test_resume.py::test_other_data_are_refused_by_name_and_nothing_is_written_over",
    ),
    Mutation(
        "what was recorded past the checkpoint stays in the records",
        "telemetry/records.py",
        'if row["step"] <= step]',
        "]",
        "telemetry/test_records.py::test_resume_cuts_rows_past_the_checkpoint_and_a_torn_last_line",
    ),
    Mutation(
        "a checkpoint is complete, and old ones are removed, before it is written",
        "checkpoint/protocol.py",
        WRITTEN,
        "agree(lambda: _complete(snapshot.plan, unfinished, {}, keep, snapshot.best))\n        agree(begin)\n"
        f"        {WRITTEN}",
        f"{SAVING}::test_the_only_checkpoint_survives_a_kill_while_the_next_is_written",
    ),
    Mutation(
        "the checksums of a checkpoint are not looked at",
        "checkpoint/manifest.py",
        "if describe_file(directory / name).sha256 != checksum:",
        "if False:",
        "checkpoint/test_manifest.py::test_damage_is_named",
    ),
    Mutation(
        "a checkpoint that later ones need is removed",
        "checkpoint/protocol.py",
        "if old.name not in needed:",
        "if True:",
        "checkpoint/test_protocol.py::test_retention_keeps_bases_and_later_checkpoints",
    ),
    Mutation(
        "an incremental checkpoint leaves out what was frozen since the last",
        "checkpoint/changes.py",
        "if weight in self.changed | trained else",
        "if weight in trained else",
        "checkpoint/test_changes.py::test_what_is_switched_while_one_is_written_is_in_the_next",
    ),
    Mutation(
        "what trains is not copied before it is written in the background",
        "checkpoint/save.py",
        "if name not in trained and store.thaw_replaces",
        "if store.thaw_replaces",
        f"{SAVING}::test_training_goes_on_while_it_writes[bfloat16]",
    ),
    Mutation(
        "tied weights are written twice",
        "sharding/store.py",
        "if first_names[id(tensor)] == name",
        "",
        "checkpoint/test_export.py::test_transformers_loads_the_same_model",
    ),
    Mutation(
        "adapters are left out of the export",
        "checkpoint/adapters.py",
        'yield f"{layer}.weight", merge(plain(name), a, b, scaling_of(adapters, a.shape[0]), magnitude, transposed)',
        'yield f"{layer}.weight", plain(name)',
        "checkpoint/test_adapters.py::test_both_exports_answer_as_the_trained_model",
    ),
]

MUTATIONS = [*STEP, *SWITCH, *DATA, *CHECKPOINT]
