# The kernels beside their peers, on a GPU; without one the benches say so and skip. Not part of `all`.
rule kernel_benches:
    log:
        "<logs>/kernels/benches.log",
    benchmark:
        "<benchmarks>/kernels/benches.tsv"
    resources:
        **NEEDS["bench"],
    message:
        "Timing the kernels"
    shell:
        "pytest kernels/benches -rs 2>&1 | tee {log}"
