# Steps 8 and 10: one rule for every stage of the configuration.
# Checkpoints and metrics are no outputs, so that a stopped training goes on; docs/failures.md says how it ends and what
# then. The log is also shown, for its progress bar, by a `tee` that the trainer's signals do not end.
# One thread: at the miniature's size a second one saves a tenth of the time, and costs far more where the core is busy;
# generating and scoring run beside it.
rule train:
    input:
        stage_inputs,
    output:
        finished="<results>/train/{stage}/finished.json",
    log:
        "<logs>/train/{stage}.log",
    benchmark:
        "<benchmarks>/train/{stage}.tsv"
    priority: 2 * ON_THE_WAY
    container:
        # The job is outside, where `srun` is, and puts its launchers inside.
        None if CONTAINED else IMAGE
    threads: 1
    resources:
        **TRAINING_NEEDS,
        mpi=starter,
        contained=contained,
        attempt=lambda wildcards, attempt: attempt,
    params:
        config=RESOLVED_CONFIG,
        start_from=lambda wildcards: model_folder(CONFIG.stages[wildcards.stage].start_from),
        data=f"{RESULTS}/data",
        out=subpath(output.finished, parent=True),
        settings=stage_settings,
    message:
        "Training stage {wildcards.stage}"
    shell:
        "start_training.sh '{resources.mpi}' {resources.nodes} "
        "$(({resources.cpus_per_task} * {resources.tasks_per_node})) {resources.gres} {resources.attempt} {params.out} "
        "{resources.contained} vlm train --config {params.config} --stage {wildcards.stage} "
        "--start-from {params.start_from} --data {params.data} --out {params.out} 2>&1 "
        "| (trap '' INT TERM USR1; exec tee {log})"
