# Steps 11-13: what each model says about the held-out items, scored beside its controls.
CAPTION_SCORES = expand(
    "<results>/scores/{model}/{task}.json",
    model=MODELS,
    task=["captions", "captions_shuffled"],
) + expand(
    "<results>/scores/controls/{control}.json",
    control=["random", "nearest", "reference"],
)
MMMU_SCORES = expand("<results>/scores/{model}/mmmu.json", model=MODELS)
BENCHMARK_SCORES = {name: expand(f"<results>/scores/{{model}}/{name}.json", model=MODELS) for name in BENCHMARKS}


rule generate:
    input:
        checkpoint=lambda wildcards: finished_file(wildcards.model),
        source=lambda wildcards: source_folder(evaluation_of(wildcards)),
    output:
        "<results>/generate/{model}/{task}.jsonl",
    log:
        "<logs>/generate/{model}_{task}.log",
    benchmark:
        "<benchmarks>/generate/{model}_{task}.tsv"
    resources:
        **GENERATION_NEEDS,
    params:
        config=RESOLVED_CONFIG,
        checkpoint=lambda wildcards: model_folder(wildcards.model),
        settings=task_settings,
    message:
        "Generating {wildcards.task} with the model {wildcards.model}"
    shell:
        "vlm generate --config {params.config} --checkpoint {params.checkpoint} --task {wildcards.task} "
        "--source {input.source} --out {output} > {log} 2>&1"


rule score_captions:
    input:
        predictions="<results>/generate/{model}/{task}.jsonl",
        source=source_folder("captions"),
    output:
        "<results>/scores/{model}/{task}.json",
    log:
        "<logs>/scores/{model}_{task}.log",
    benchmark:
        "<benchmarks>/scores/{model}_{task}.tsv"
    wildcard_constraints:
        task="captions|captions_shuffled",
    resources:
        **NEEDS["score"],
    params:
        annotations=CONFIG.evaluation.captions.annotations,
    message:
        "Scoring {wildcards.task} of the model {wildcards.model}"
    shell:
        "vlm score captions --annotations {input.source}/{params.annotations:q} --predictions {input.predictions} "
        "--output {output} > {log} 2>&1"


rule score_mmmu:
    input:
        predictions="<results>/generate/{model}/mmmu.jsonl",
        source=source_folder("mmmu"),
    output:
        "<results>/scores/{model}/mmmu.json",
    log:
        "<logs>/scores/{model}_mmmu.log",
    benchmark:
        "<benchmarks>/scores/{model}_mmmu.tsv"
    params:
        split=CONFIG.evaluation.mmmu.split,
        fallback=CONFIG.evaluation.mmmu.fallback,
        seed=CONFIG.seed,
    message:
        "Scoring mmmu of the model {wildcards.model}"
    shell:
        "vlm score mmmu --answers {input.source} --split {params.split:q} --predictions {input.predictions} "
        "--fallback {params.fallback} --seed {params.seed} --output {output} > {log} 2>&1"


if BENCHMARKS:

    rule score_benchmark:
        input:
            predictions="<results>/generate/{model}/{benchmark}.jsonl",
            source=lambda wildcards: source_folder(wildcards.benchmark),
        output:
            "<results>/scores/{model}/{benchmark}.json",
        log:
            "<logs>/scores/{model}_{benchmark}.log",
        benchmark:
            "<benchmarks>/scores/{model}_{benchmark}.tsv"
        wildcard_constraints:
            benchmark="|".join(BENCHMARKS),
        resources:
            **NEEDS["score"],
        params:
            split=lambda wildcards: BENCHMARKS[wildcards.benchmark].split,
        message:
            "Scoring {wildcards.benchmark} of the model {wildcards.model}"
        shell:
            "vlm score {wildcards.benchmark} --annotations {input.source} --split {params.split:q} "
            "--predictions {input.predictions} --output {output} > {log} 2>&1"


rule control:
    input:
        source=source_folder("captions"),
        train=source_folder(CAPTION_SET),
    output:
        "<results>/controls/{control}.json",
    log:
        "<logs>/controls/{control}.log",
    benchmark:
        "<benchmarks>/controls/{control}.tsv"
    resources:
        **NEEDS["score"],
    params:
        config=RESOLVED_CONFIG,
        settings=settings("evaluation/captions", f"data/sets/{CAPTION_SET}", "seed"),
    message:
        "Making the control {wildcards.control}"
    shell:
        "vlm score controls --config {params.config} --control {wildcards.control} --source {input.source} "
        "--train {input.train} --out {output} > {log} 2>&1"


# One reference of each picture as the prediction, scored against the references that are left.
rule control_reference:
    input:
        source=source_folder("captions"),
        train=source_folder(CAPTION_SET),
    output:
        predictions="<results>/controls/reference.json",
        annotations="<results>/controls/reference_annotations.json",
    log:
        "<logs>/controls/reference.log",
    benchmark:
        "<benchmarks>/controls/reference.tsv"
    resources:
        **NEEDS["score"],
    params:
        config=RESOLVED_CONFIG,
        settings=settings("evaluation/captions", "seed"),
    message:
        "Making the control reference"
    shell:
        "vlm score controls --config {params.config} --control reference --source {input.source} "
        "--train {input.train} --out {output.predictions} --annotations-out {output.annotations} > {log} 2>&1"


rule score_control:
    input:
        predictions="<results>/controls/{control}.json",
        source=source_folder("captions"),
    output:
        "<results>/scores/controls/{control}.json",
    log:
        "<logs>/scores/controls_{control}.log",
    benchmark:
        "<benchmarks>/scores/controls_{control}.tsv"
    resources:
        **NEEDS["score"],
    params:
        annotations=CONFIG.evaluation.captions.annotations,
    message:
        "Scoring the control {wildcards.control}"
    shell:
        "vlm score captions --annotations {input.source}/{params.annotations:q} --predictions {input.predictions} "
        "--output {output} > {log} 2>&1"


rule score_control_reference:
    input:
        predictions="<results>/controls/reference.json",
        annotations="<results>/controls/reference_annotations.json",
    output:
        "<results>/scores/controls/reference.json",
    log:
        "<logs>/scores/controls_reference.log",
    benchmark:
        "<benchmarks>/scores/controls_reference.tsv"
    resources:
        **NEEDS["score"],
    message:
        "Scoring the control reference"
    shell:
        "vlm score captions --annotations {input.annotations} --predictions {input.predictions} "
        "--output {output} > {log} 2>&1"


rule table:
    input:
        CAPTION_SCORES,
        MMMU_SCORES,
        BENCHMARK_SCORES.values(),
    output:
        report(
            "<results>/scores/table.csv",
            caption="../report/table.rst",
            category="Scores",
            labels={"what": "table of scores and controls"},
        ),
    log:
        "<logs>/scores/table.log",
    benchmark:
        "<benchmarks>/scores/table.tsv"
    params:
        config=RESOLVED_CONFIG,
        scores=subpath(output[0], parent=True),
        models=MODELS,
    message:
        "Gathering the scores"
    shell:
        "vlm score table --config {params.config} --scores {params.scores} --out {output} > {log} 2>&1"
