"""Other toolkits, each in an environment of its own, timed on the same model and the same tokens.

    environments.py   which toolkits, in which versions, and how their environments are made
    process.py        run one toolkit as a process, with a time limit; its peak memory
    job.py            what such a process is told, and the seconds it reports
    prepare.py        the model and the token windows, written once for everybody
    awq_core.py, autoawq.py, llmcompressor.py, gptqmodel.py, autoround.py, modelopt.py
                      one toolkit each: load, quantize, save
    layouts.py        from any exported file back to plain weights
    distance.py       the measures of benchmarks/engines.py
    logits.py         logits of an AWQ folder in transformers itself, for benchmarks/engines.py
    vllm_*.py         its weights, log-probabilities and tokens in vLLM itself, and a product where vLLM has none
    evaluate.py       perplexity and KL divergence of every result, all by the same code

`benchmarks/quantize.py` is the command. It and the first three of these need nothing but Python, so that the process
that starts the others is small: an operating system counts a process's memory from before it loads its program.
"""
