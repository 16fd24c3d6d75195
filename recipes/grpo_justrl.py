"""Train with the JustRL recipe: one file per run, one launch line.

    accelerate launch recipes/grpo_justrl.py                                        # tiny.yaml, a laptop is enough
    accelerate launch --config_file accelerate_configs/zero3_8gpu.yaml \\
        recipes/grpo_justrl.py --config recipes/justrl_deepseek_1.5b.yaml           # the paper's model on one node
    ... --dry_run                                                                   # print configuration and plan, exit

Every key of a recipe is an option too (`--learning_rate 5e-7`), and options win. `--help` lists them all.
"""

import time
from pathlib import Path

import yaml
from transformers import AutoTokenizer
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config

from justrl_trl.distributed import leave_together, on_rank_zero
from justrl_trl.policy.attention import choose_attention, describe_attention
from justrl_trl.preflight.checkpoint_disk import checkpoint_disk
from justrl_trl.preflight.gpu_driver import check_gpu_driver
from justrl_trl.preflight.gpu_memory import model_size
from justrl_trl.preflight.nodes import check_shared_folder
from justrl_trl.runs.arguments import parse
from justrl_trl.runs.folder import RunFolder
from justrl_trl.runs.heldout import HeldOut
from justrl_trl.runs.progress import RolloutStepPrinter, plan_lines
from justrl_trl.runs.recorder import RecordRun
from justrl_trl.runs.servers import connect, plan_sharing, start_servers
from justrl_trl.runs.setup import check_machine, load_data, resolve_model
from justrl_trl.runs.summary import table_lines, write_summary
from justrl_trl.runs.validation import Validate
from justrl_trl.terminal import quiet_libraries, report_errors, say
from justrl_trl.training.rewards import reward_functions
from justrl_trl.training.trainer import JustRLTrainer


def main() -> None:
    started = time.monotonic()
    quiet_libraries()
    check_gpu_driver()

    # what to do
    run, training, model = parse(default_recipe=Path(__file__).with_name("tiny.yaml"))
    check_machine(training)
    half_precision = training.bf16 or training.fp16
    attention = choose_attention(model.attn_implementation, half_precision)
    model_path = resolve_model(model, training)
    tokenizer = AutoTokenizer.from_pretrained(model_path, revision=model.model_revision, padding_side="left")
    data = load_data(run, training, tokenizer)
    zero_stage = training.deepspeed_plugin.zero_stage if training.deepspeed_plugin else 0
    size = model_size(model_path, model.model_revision)
    trained = size.parameters // 50 if model.use_peft else size.parameters  # adapters are a few per cent at most
    shards = training.world_size if zero_stage == 3 else 1
    sharing = plan_sharing(training, size, shards=shards, trained=trained)
    disk = checkpoint_disk(training, size.parameters, trained)
    folder = RunFolder(training.output_dir)
    validation = Validate(training, tokenizer, folder) if training.validation_benchmarks else None
    if run.dry_run:
        say([yaml.safe_dump(folder.resolved(run, training, model), sort_keys=True)])
    say(
        plan_lines(
            training=training,
            model=model.model_name_or_path,
            attention=describe_attention(attention, half_precision),
            dataset=run.dataset_name,
            data_lines=data.report.lines(),
            heldout_size=len(data.heldout) if data.heldout else 0,
            validation=validation.tasks if validation else [],
            zero_stage=zero_stage,
            sharing=sharing,
            disk=disk,
        )
    )
    disk.check()
    if run.dry_run:
        return
    check_shared_folder(folder.path, training.distributed_state)

    # who does it: servers, then the trainer; both load at the same time
    servers = []
    if training.distributed_state.is_main_process:
        moved = folder.prepare(resume=bool(training.resume_from_checkpoint))
        say([f"an earlier run was moved to {moved}"] if moved else [])
        folder.write_config(run, training, model)
        if not training.rollout_servers:
            servers = start_servers(model_path, training, model.model_revision, folder.server_log, sharing)
    if sharing and training.process_index == sharing.gpu:  # managed servers are on the machine of rank 0
        sharing.hold_trainer()
    training.model_init_kwargs = {
        "dtype": model.dtype,
        "revision": model.model_revision,
        "attn_implementation": attention,
        "use_safetensors": True,
    }
    pools: list = []  # servers may take longer to start than ranks may wait for each other
    on_rank_zero(lambda: pools.append(connect(model_path, training, servers)), training.distributed_state)
    pool = pools[0] if pools else None
    recorder = RecordRun(folder, model.model_name_or_path, on_row=RolloutStepPrinter(training.num_rollout_steps))
    # the recorder comes last, so that its final figure includes the last scores
    callbacks = [HeldOut(folder), *([validation] if validation else []), recorder]
    trainer = JustRLTrainer(
        model=model_path,
        args=training,
        train_dataset=data.train,
        pool=pool,
        heldout_dataset=data.heldout,
        reward_funcs=reward_functions(training),
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=get_peft_config(model),
    )
    for callback in callbacks:
        callback.trainer = trainer

    # do it
    checkpoint = training.resume_from_checkpoint
    trainer.train(resume_from_checkpoint=get_last_checkpoint(folder.path) if checkpoint in ("True", "true") else checkpoint)

    # tell
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=run.dataset_name)
    if trainer.is_world_process_zero():
        seconds = time.monotonic() - started
        summary = write_summary(folder, seconds=seconds, world_size=training.world_size, zero_stage=zero_stage)
        last = get_last_checkpoint(folder.path)
        say(table_lines(summary, folder, Path(last) if last else None))
        pool.close()
    leave_together()


if __name__ == "__main__":
    with report_errors():
        main()
