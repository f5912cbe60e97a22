# What a person opens: loss curves, scores beside their controls, a gallery, and one page that holds it all.
rule curves:
    input:
        expand("<results>/train/{stage}/finished.json", stage=STAGES),
    output:
        report(
            "<results>/report/loss.png",
            caption="../report/loss.rst",
            category="Training",
            labels={"what": "loss of every stage"},
        ),
    log:
        "<logs>/report/loss.log",
    benchmark:
        "<benchmarks>/report/loss.tsv"
    params:
        metrics=expand(f"{RESULTS}/train/{{stage}}/metrics.jsonl", stage=STAGES),
    message:
        "Drawing the loss curves"
    shell:
        "vlm report curves --metrics {params.metrics} --out {output} > {log} 2>&1"


rule scores:
    input:
        "<results>/scores/table.csv",
    output:
        report(
            "<results>/report/scores.png",
            caption="../report/scores.rst",
            category="Scores",
            labels={"what": "scores beside their controls"},
        ),
    log:
        "<logs>/report/scores.log",
    benchmark:
        "<benchmarks>/report/scores.tsv"
    message:
        "Drawing the scores"
    shell:
        "vlm report scores --table {input} --out {output} > {log} 2>&1"


rule gallery:
    input:
        generated=expand(
            "<results>/generate/{model}/{task}.jsonl",
            model=MODELS,
            task=["captions", "mmmu"],
        ),
        dialogue=f"<results>/generate/{LAST_STAGE}/dialogue.jsonl",
        sources=[source_folder(name) for name in EVALUATIONS],
    output:
        report(
            "<results>/report/gallery.html",
            caption="../report/gallery.rst",
            category="Gallery",
            labels={"what": "held-out pictures and what was said"},
        ),
    log:
        "<logs>/report/gallery.log",
    benchmark:
        "<benchmarks>/report/gallery.tsv"
    params:
        config=RESOLVED_CONFIG,
        sources=lambda wildcards, input: Path(input.sources[0]).parent,
        generated=lambda wildcards, input: Path(input.generated[0]).parents[1],
    message:
        "Making the gallery"
    shell:
        "vlm report gallery --config {params.config} --sources {params.sources} --generated {params.generated} "
        "--out {output} > {log} 2>&1"


rule configuration:
    output:
        report(
            "<results>/report/configuration.yaml",
            caption="../report/configuration.rst",
            category="Configuration",
            labels={"what": "every setting of the run"},
        ),
    log:
        "<logs>/report/configuration.log",
    benchmark:
        "<benchmarks>/report/configuration.tsv"
    params:
        config=RESOLVED_CONFIG,
        settings=lambda wildcards: dump(CONFIG),
    message:
        "Keeping the configuration"
    shell:
        "cp {params.config} {output} 2> {log}"


rule report_pages:
    input:
        rules.curves.output,
        rules.table.output,
        rules.scores.output,
        rules.gallery.output,
        rules.configuration.output,
        rules.verify.output,


# Snakemake's own report on everything above. It reads the resolved configuration, so it needs no profile; the lock is
# held by the run that starts it.
rule report:
    input:
        rules.report_pages.input,
    output:
        "<results>/report.html",
    log:
        "<logs>/report/report.log",
    benchmark:
        "<benchmarks>/report/report.tsv"
    params:
        config=RESOLVED_CONFIG,
    message:
        "Writing the report {output}"
    shell:
        "snakemake --profile none --nolock --configfile {params.config} --report {output} report_pages > {log} 2>&1"


# Seconds of one core each: as jobs they would wait in the queue, start and be noticed for ten times as long.
localrules:
    configuration,
    curves,
    gallery,
    report,
    score_mmmu,
    scores,
    table,
