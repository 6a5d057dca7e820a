// The selected experts of an FFN as an operation of OpenVINO. The kernel of kernels/cpu computes it in bfloat16.
//
// extension.py compiles this file and loads it. The threads are those of OpenVINO's own arena, because two teams on the
// same cores would fight.
#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/pytorch/extension/conversion.hpp>
#include <openvino/op/convert.hpp>
#include <openvino/op/op.hpp>

#define LTE_TEAM lte_openvino_team
#include "ffn.cpp"

namespace {

void lte_openvino_team(void (*work)(void*), void* data, unsigned threads, unsigned) {
    tbb::parallel_for(0u, threads, [&](unsigned) { work(data); }, tbb::simple_partitioner());
}

void* data_of(const ov::Tensor& tensor) { return const_cast<void*>(tensor.data()); }

// Inputs: x [N, D], mask [N, E], up [E, S, D], down [E, S, D], then gate, up_bias, gate_bias and down_bias if the FFN
// has them. All but the mask are bfloat16.
class LteFfn : public ov::op::Op {
public:
    OPENVINO_OP("LteFfn", "lte_lightning");
    LteFfn() = default;
    LteFfn(const ov::OutputVector& inputs, std::vector<int64_t> given, int64_t activation)
        : Op(inputs), given(std::move(given)), activation(activation) {
        constructor_validate_and_infer_types();
    }
    void validate_and_infer_types() override {
        OPENVINO_ASSERT(get_input_element_type(0) == ov::element::bf16, "LteFfn computes in bfloat16");
        set_output_type(0, ov::element::bf16, get_input_partial_shape(0));
    }
    std::shared_ptr<Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
        return std::make_shared<LteFfn>(inputs, given, activation);
    }
    bool visit_attributes(ov::AttributeVisitor& visitor) override {
        visitor.on_attribute("given", given);
        visitor.on_attribute("activation", activation);
        return true;
    }
    bool has_evaluate() const override { return true; }
    bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& inputs) const override {
        const auto x = inputs[0].get_shape(), up = inputs[2].get_shape();
        outputs[0].set_shape(x);
        const int64_t sizes[] = {int64_t(x[0]), int64_t(x[1]), int64_t(up[0]), int64_t(up[1])};
        void* more[4];
        size_t next = 4;
        for (int i = 0; i < 4; i++) more[i] = given[i] ? data_of(inputs[next++]) : nullptr;
        void* pointers[] = {data_of(inputs[0]), data_of(inputs[2]), more[0], data_of(inputs[3]),
                            more[1],            more[2],            more[3], outputs[0].data()};
        const int threads = tbb::this_task_arena::max_concurrency(), bfloat16 = 1;
        return lte_ffn(bfloat16, sizes, int(activation), threads, ANY, static_cast<uint8_t*>(data_of(inputs[1])),
                       pointers) == 0;
    }

private:
    std::vector<int64_t> given;
    int64_t activation = 0;
};

// Converts torch's operator lte_lightning::cpu_ffn, see ffn.py.
ov::OutputVector converted(const ov::frontend::NodeContext& node) {
    auto narrowed = [&](int i) -> ov::Output<ov::Node> {
        return std::make_shared<ov::op::v0::Convert>(node.get_input(i), ov::element::bf16);
    };
    ov::OutputVector inputs{narrowed(0), node.get_input(1), narrowed(2), narrowed(3)};
    std::vector<int64_t> given;
    for (int i = 5; i < 9; i++) {
        given.push_back(!node.input_is_none(i));
        if (given.back()) inputs.push_back(narrowed(i));
    }
    const std::vector<std::string> names{"relu", "gelu", "gelu_tanh", "silu"};  // as in vector.h
    auto name = node.get_values_from_const_input(4).as<std::string>();
    name.erase(std::remove(name.begin(), name.end(), ' '), name.end());  // OpenVINO passes it letter by letter
    const auto found = std::find(names.begin(), names.end(), name);
    OPENVINO_ASSERT(found != names.end(), "no kernel has the activation ", name);
    const auto ffn = std::make_shared<LteFfn>(inputs, given, found - names.begin());
    return std::make_shared<ov::op::v0::Convert>(ffn, ov::element::f32)->outputs();
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>(
    {std::make_shared<ov::OpExtension<LteFfn>>(), std::make_shared<ov::frontend::pytorch::ConversionExtension>(
                                                      "lte_lightning.cpu_ffn.default", converted)}));
