"""Settings of experts that do not fit the others, and what the message says."""

EXPERTS = "model.moe={num_experts: 8, top_k: 2}"
PROXY = ["completep.base_hidden_size=64", "completep.base_num_layers=2"]

EXPERT_RULES = [
    (
        ["model.moe={num_experts: 4, top_k: 5}"],
        "model.moe.top_k = 5 is more than model.moe.num_experts = 4. Use at most 4.",
    ),
    (
        ["model.moe={num_experts: 4, top_k: 1, first_dense_layers: 8}"],
        "model.moe.first_dense_layers = 8 leaves no layer of model.num_layers = 8 with experts",
    ),
    (
        ["model.moe={num_experts: 4, top_k: 2, gate: softmax}"],
        "model.moe.balance = bias moves the scores of sigmoid gates",
    ),
    (
        ["model.moe={num_experts: 4, top_k: 1, gate: softmax, balance: none}"],
        "model.moe.top_k = 1 gives a token's only expert the weight 1 with model.moe.gate = "
        "softmax, so that the router would never learn from the tokens. Use gate = sigmoid",
    ),
    (["model.moe={num_experts: 4, top_k: 1, balance: loss}"], "balance_loss, which is 0. Use"),
    (
        ["model.moe={num_experts: 4, top_k: 1, balance: none, balance_loss: 0.01}"],
        "model.moe.balance_loss = 0.01 would balance, but model.moe.balance = none. Use balance =",
    ),
    (
        ["model.moe={num_experts: 2, top_k: 2, balance_loss: 0.01}"],
        "model.moe.balance_loss = 0.01 is constant: each token goes to all model.moe.num_experts = "
        "2 experts, whose loads are equal. Use balance = none and balance_loss = 0.",
    ),
    ([EXPERTS, "model.bias=true"], "model.bias = true does not go with model.moe"),
    ([EXPERTS, "training.cuda_graph=true"], "training.cuda_graph = true cannot capture model.moe"),
    (
        [EXPERTS, "optimizer.type=muon", "optimizer.muon={base_lr: 0.02}"],
        "optimizer.type = muon does not make the matrices of experts orthogonal yet",
    ),
    (
        [EXPERTS, "parallel.tensor_parallel_size=2"],
        "model.moe with parallel.tensor_parallel_size = 2 needs each tensor rank to hold tokens of "
        "its own. Use parallel.sequence_parallel = true",
    ),
    (
        [EXPERTS, "parallel.expert_parallel_size=3"],
        "parallel.expert_parallel_size = 3 does not divide model.moe.num_experts = 8. Use 1, 2, 4",
    ),
    (
        [
            "model.moe={num_experts: 8, top_k: 2, shared_ffn_hidden_size: 129}",
            "parallel.tensor_parallel_size=2",
            "parallel.sequence_parallel=true",
        ],
        "parallel.tensor_parallel_size = 2 does not divide model.moe.shared_ffn_hidden_size = 129",
    ),
    (
        [EXPERTS, *PROXY, "completep.base_num_experts=4", "completep.base_top_k=2"],
        "model.moe: top_k / num_experts = 2 / 8, but the proxy's is 2 / 4, and learning rates are "
        "not known to transfer to another share of active experts. Use model.moe.top_k = 4, or",
    ),
    (
        [
            *(EXPERTS, *PROXY, "completep.base_num_experts=2", "completep.base_top_k=4"),
            "completep.allow_sparsity_change=true",
        ],
        "completep.base_top_k = 4 is more than completep.base_num_experts = 2: no proxy can have "
        "been so. Use completep.base_top_k = 2.",
    ),
    (
        [EXPERTS, *PROXY, "completep.base_expert_ffn_hidden_size=128"],
        "an expert's inner width over the width is 1024 / 256, but the proxy's is 128 / 64",
    ),
    (
        [EXPERTS, "completep.base_top_k=2"],
        "completep.base_top_k = 2 is given without the proxy's shape",
    ),
    (["completep.base_top_k=2"], "completep.base_top_k = 2 has no meaning without model.moe"),
    (
        ["parallel.expert_parallel_size=2"],
        "parallel.expert_parallel_size = 2 has no experts to share: model.moe is null",
    ),
]
