# Steps 5-7 and 9: the data sets, their WebDataset shards and the Energon index.
RENDERED = {**CONFIG.data.sets, **EVALUATIONS} if CONFIG.miniature else {}

if CONFIG.miniature:

    rule tiny_data:
        input:
            DRAWINGS,
        output:
            [directory(source_folder(name)) for name in RENDERED],
        log:
            "<logs>/data/tiny.log",
        benchmark:
            "<benchmarks>/data/tiny.tsv"
        priority: ON_THE_WAY
        resources:
            **NEEDS["shard"],
        params:
            config=RESOLVED_CONFIG,
            out=subpath(source_folder(CAPTION_SET), parent=True),
            settings=rendering_settings(),
        message:
            "Rendering the miniature data sets"
        shell:
            "vlm tiny data --config {params.config} --out {params.out} > {log} 2>&1"


# Data sets of one source share its folder. Of a benchmark's repository only the files of its split are needed.
FETCHED = {}
for name in SOURCES:
    if name not in RENDERED:
        FETCHED.setdefault(source_folder(name), []).append(name)

for folder, names in FETCHED.items():

    rule:
        name:
            f"fetch_{names[0]}_data"
        output:
            directory(folder),
        log:
            f"<logs>/fetch/{names[0]}.log",
        benchmark:
            f"<benchmarks>/fetch/{names[0]}.tsv"
        resources:
            **NEEDS["fetch"],
        params:
            sources=listed(SOURCES[names[0]].source),
            revision=SOURCES[names[0]].revision,
            options=fetch_options(names),
        message:
            f"Fetching the data of {' and '.join(names)} from {' and '.join(listed(SOURCES[names[0]].source))}"
        shell:
            "vlm fetch {params.sources:q} {output} --revision {params.revision:q} --kind dataset {params.options} "
            "> {log} 2>&1"


# All that comes from the internet, for a machine that reaches it: elsewhere nothing is left to fetch then.
rule sources:
    input:
        list(FETCHED),
        expand("<results>/sources/{part}", part=FETCHED_PARTS),
        [CONFIG.models.language.source] if STORED_AS_GGUF else [],
        DRAWINGS,


for name in CONFIG.data.sets:

    rule:
        name:
            f"shard_{name}"
        input:
            source_folder(name),
        output:
            f"<results>/data/{name}/shards.json",
        log:
            f"<logs>/data/shard_{name}.log",
        benchmark:
            f"<benchmarks>/data/shard_{name}.tsv"
        priority: ON_THE_WAY
        threads: NEEDS["shard"]["cpus_per_task"]
        resources:
            **NEEDS["shard"],
        params:
            config=RESOLVED_CONFIG,
            name=name,
            out=subpath(output[0], parent=True),
            settings=settings(f"data/sets/{name}", "data/max_rejected_share", "seed"),
        message:
            f"Writing the shards of {name}"
        shell:
            "vlm data shard --config {params.config} --set {params.name} --source {input} --out {params.out} "
            "--workers {threads} > {log} 2>&1"

    # The index lies inside the folder of the shards, where Energon wants it, so the folder is not itself an output.
    rule:
        name:
            f"index_{name}"
        input:
            f"<results>/data/{name}/shards.json",
        output:
            f"<results>/data/{name}/.nv-meta/dataset.yaml",
        log:
            f"<logs>/data/index_{name}.log",
        benchmark:
            f"<benchmarks>/data/index_{name}.tsv"
        priority: ON_THE_WAY
        resources:
            **NEEDS["index"],
        params:
            shards=subpath(output[0], ancestor=2),
        message:
            f"Indexing {name} for Energon"
        shell:
            "vlm data index {params.shards} > {log} 2>&1"
