"""Plans for other engines: written for SGLang, vLLM, TensorRT-LLM and vllm-ascend, and checked as those read them.

`export_plan` and `check_plan` are the way in; `vllm_policy` is a policy for vLLM's own balancer.
"""
