// The operators sst_fast::* for PyTorch's dispatcher: schemas, autograd, and the shapes that torch.compile traces with.
// Python calls them after it has checked the arguments (sst_fast/arguments.py); a C++ program finds them by name.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include "arguments.h"
#include "ops.h"
#include "ring.h"

namespace sst_fast {
namespace {

namespace autograd = torch::autograd;
using Tensors = c10::List<OptionalTensor>;
using Text = c10::string_view;

template <typename Signature>
auto find_operator(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(("sst_fast::" + name).c_str(), "").typed<Signature>();
}

// --- the loss --------------------------------------------------------------------------------------------------------

using Loss = ResultTuple(
    const at::Tensor&, const at::Tensor&, const OptionalTensor&, const Tensors&, at::IntArrayRef, at::ArrayRef<double>);
using LossBy = ResultTuple(
    const at::Tensor&, const at::Tensor&, const OptionalTensor&, const Tensors&, at::IntArrayRef, at::ArrayRef<double>,
    Text);
using Gradient = at::Tensor(
    const at::Tensor&, at::TensorList, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const Tensors&,
    at::IntArrayRef, at::ArrayRef<double>);
using GradientBy = at::Tensor(
    const at::Tensor&, at::TensorList, const at::Tensor&, const at::Tensor&, const OptionalTensor&, const Tensors&,
    at::IntArrayRef, at::ArrayRef<double>, Text);

ResultTuple margin_softmax(
    const at::Tensor& embedding, const at::Tensor& prototypes, const OptionalTensor& positive, const Tensors& tensors,
    at::IntArrayRef integers, at::ArrayRef<double> numbers, Text backend) {
  if (backend == "cpu")
    return as_tuple(cpu::margin_softmax(Arguments(embedding, prototypes, positive, tensors, integers, numbers)));
#ifdef SST_FAST_CUDA
  if (backend == "hopper")
    return as_tuple(cuda::margin_softmax(Arguments(embedding, prototypes, positive, tensors, integers, numbers)));
#endif
  return find_operator<Loss>(std::string(backend) + "_margin_softmax")
      .call(embedding, prototypes, positive, tensors, integers, numbers);
}

// found: row_weight, lse, negatives, target_slope and kept of the forward pass.
at::Tensor prototype_gradient(
    const at::Tensor& grad_loss, at::TensorList found, const at::Tensor& embedding, const at::Tensor& prototypes,
    const OptionalTensor& positive, const Tensors& tensors, at::IntArrayRef integers, at::ArrayRef<double> numbers,
    Text backend) {
  if (backend == "cpu")
    return cpu::prototype_gradient(
        (grad_loss * found[0]).contiguous(), found[1], found[2], found[3],
        Arguments(embedding, prototypes, positive, tensors, integers, numbers));
  return find_operator<Gradient>(std::string(backend) + "_prototype_gradient")
      .call(grad_loss, found, embedding, prototypes, positive, tensors, integers, numbers);
}

// Forward has already found the gradient of each row's own loss; the incoming factor is multiplied in before the one
// rounding to the embeddings' dtype, so a loss scale saves small gradients of half precision from underflow.
// `embedding` is there for autograd alone: a second derivative with respect to it must fail, not be zero.
at::Tensor margin_softmax_backward(
    const at::Tensor& grad_loss, const at::Tensor& row_weight, const at::Tensor& gradient,
    const at::Tensor& embedding) {
  if (gradient.device().is_cpu()) return cpu::scaled_rows(grad_loss, row_weight, gradient, embedding.scalar_type());
  return (gradient * (grad_loss * row_weight).unsqueeze(1)).to(embedding.scalar_type());
}

// Rows divided by their norms, and the norms [.., 1], both in double. Squares of finite numbers never overflow; a row
// shorter than kMinNorm becomes zero, one that is not finite NaN as a whole.
std::pair<at::Tensor, at::Tensor> unit_rows(const at::Tensor& rows) {
  const at::Tensor wide = rows.to(at::kDouble);
  const at::Tensor largest = wide.abs().amax(-1, true).clamp_min(std::numeric_limits<double>::min());
  const at::Tensor scaled = wide / largest, length = scaled.norm(2, -1, true), norm = length * largest;
  return {at::where(norm < kMinNorm, at::zeros_like(wide), scaled / length), norm};
}

// The target cosine is the only place where an explicit positive counts. `normalize`: it was normalised inside.
at::Tensor positive_gradient(
    const at::Tensor& grad_loss, const at::Tensor& row_weight, const at::Tensor& target_slope,
    const at::Tensor& embedding, const at::Tensor& positive, bool normalize) {
  const at::Tensor slope = grad_loss * row_weight * target_slope;
  at::Tensor gradient = slope.unsqueeze(1) * unit_rows(embedding).first;
  gradient.masked_fill_((row_weight == 0).unsqueeze(1), 0);  // an ignored row may hold anything
  if (normalize) {
    const auto [hat, norm] = unit_rows(positive);
    gradient =
        at::where(norm < kMinNorm, at::zeros_like(gradient), (gradient - (gradient * hat).sum(1, true) * hat) / norm);
  }
  return gradient.to(positive.scalar_type());
}

// --- shapes, for torch.compile ---------------------------------------------------------------------------------------

ResultTuple margin_softmax_shapes(
    const at::Tensor& embedding, const at::Tensor& prototypes, const OptionalTensor& positive, const Tensors& tensors,
    at::IntArrayRef integers, at::ArrayRef<double> numbers, Text) {
  const Arguments a(embedding, prototypes, positive, tensors, integers, numbers);
  const c10::SymInt N = embedding.sym_size(0), D = embedding.sym_size(1);
  const auto wide = embedding.options().dtype(a.wide() ? at::kDouble : at::kFloat);
  const auto value = [&] { return at::empty_symint({N}, wide); };
  const auto count = [&] { return at::empty_symint({N}, embedding.options().dtype(at::kLong)); };
  Results r;
  r.loss = a.reduce() == Reduction::none ? value() : at::empty({}, wide);
  for (auto* t : {&r.lse, &r.target_cosine, &r.hardest_cosine, &r.residual, &r.row_weight, &r.target_slope})
    *t = value();
  for (auto* t : {&r.hardest_slot, &r.beats_target, &r.negatives}) *t = count();
  r.gradient = at::empty_symint({a.need_gradient ? N : c10::SymInt(0), D}, wide);
  r.scale_slope = at::empty_symint({a.need_scale_gradient ? N : c10::SymInt(0)}, wide);
  const auto bytes = embedding.options().dtype(at::kByte);
  r.kept = a.keep_weights && a.need_gradient
               ? at::empty_symint({N, kept_bytes(prototypes.sym_size(0), a.kept_size())}, bytes)
               : at::empty({0, 0}, bytes);
  return as_tuple(r);
}

at::Tensor prototype_gradient_shape(
    const at::Tensor&, at::TensorList, const at::Tensor&, const at::Tensor& prototypes, const OptionalTensor&,
    const Tensors&, at::IntArrayRef, at::ArrayRef<double>, Text) {
  return at::empty_symint(prototypes.sym_sizes(), prototypes.options());
}

at::Tensor margin_softmax_backward_shape(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor& embedding) {
  return at::empty_symint(embedding.sym_sizes(), embedding.options());
}

at::Tensor positive_gradient_shape(
    const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor& positive, bool) {
  return at::empty_symint(positive.sym_sizes(), positive.options());
}

// --- autograd --------------------------------------------------------------------------------------------------------

using NodePointer = std::remove_cvref_t<decltype(std::declval<autograd::Edge>().function)>;

// Older versions of PyTorch hold nodes by std::shared_ptr and delete them by deleteNode, newer ones by intrusive
// pointers.
template <typename N, typename Pointer = NodePointer, typename... Parts>
auto make_node(Parts&&... parts) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<autograd::Node>>)
    return std::shared_ptr<N>(new N(std::forward<Parts>(parts)...), [](N* node) { deleteNode(node); });
  else
    return c10::make_intrusive<N>(std::forward<Parts>(parts)...);
}

bool wants_gradient(const OptionalTensor& t) { return t && t->defined() && t->requires_grad(); }

void refuse_forward_mode(std::initializer_list<OptionalTensor> inputs) {
  for (const auto& t : inputs)
    TORCH_CHECK_NOT_IMPLEMENTED(
        !autograd::isFwGradDefined(t),
        "sst_fast.margin_softmax has no forward-mode derivative; backend=\"reference\" has one");
}

// Makes a second derivative an error: without this it would be silently zero.
void refuse_second_derivative(at::Tensor& gradient, std::initializer_list<OptionalTensor> inputs) {
  refuse_forward_mode(inputs);
  autograd::edge_list edges;
  bool any = false;
  for (const auto& t : inputs) {
    any |= wants_gradient(t);
    edges.push_back(t && t->defined() ? autograd::impl::gradient_edge(*t) : autograd::Edge());
  }
  if (!any || !at::GradMode::is_enabled()) return;
  autograd::set_history(
      gradient, NodePointer(
                    make_node<autograd::Error>(
                        "sst_fast.margin_softmax has no second derivative: its gradient is found in forward. "
                        "backend=\"reference\" has one.",
                        std::move(edges))));
}

struct MarginSoftmaxBackward : autograd::Node {
  autograd::SavedVariable embedding, prototypes, positive, gradient, row_weight, lse, negatives, target_slope;
  autograd::SavedVariable kept, scale, scale_slope;
  std::vector<autograd::SavedVariable> tensors;
  std::vector<int64_t> integers;
  std::vector<double> numbers;
  std::string backend;
  bool normalize = false;

  std::string name() const override { return "MarginSoftmaxBackward"; }

  void release_variables() override {
    for (auto* saved :
         {&embedding, &prototypes, &positive, &gradient, &row_weight, &lse, &negatives, &target_slope, &kept, &scale,
          &scale_slope})
      saved->reset_data();
    for (auto& saved : tensors) saved.reset_data();
  }

  autograd::variable_list apply(autograd::variable_list&& grads) override {
    autograd::variable_list out(4);
    const at::Tensor& grad = grads[0];
    if (!grad.defined()) return out;
    const at::Tensor x = embedding.unpack(), weight = row_weight.unpack();
    static const auto backward = find_operator<decltype(margin_softmax_backward)>("margin_softmax_backward");
    if (task_should_compute_output(0)) out[0] = backward.call(grad, weight, gradient.unpack(), x);
    if (task_should_compute_output(1)) {
      static const auto of_prototypes = find_operator<GradientBy>("prototype_gradient");
      Tensors list;
      for (const auto& saved : tensors) {
        const at::Tensor t = saved.unpack();
        list.push_back(t.defined() ? OptionalTensor(t) : OptionalTensor());
      }
      const at::Tensor p = positive.unpack();
      out[1] = of_prototypes.call(
          grad, {weight, lse.unpack(), negatives.unpack(), target_slope.unpack(), kept.unpack()}, x,
          prototypes.unpack(), p.defined() ? OptionalTensor(p) : OptionalTensor(), list, integers, numbers, backend);
    }
    if (task_should_compute_output(2)) {
      static const auto of_positive = find_operator<decltype(positive_gradient)>("positive_gradient");
      out[2] = of_positive.call(grad, weight, target_slope.unpack(), x, positive.unpack(), normalize);
    }
    if (task_should_compute_output(3)) {  // a gradient of one number for each row
      const at::Tensor slope = scale_slope.unpack().unsqueeze(1), rows = scale.unpack().unsqueeze(1);
      out[3] = backward.call(grad, weight, slope, rows).squeeze(1);
    }
    return out;
  }
};

ResultTuple margin_softmax_autograd(
    const at::Tensor& embedding, const at::Tensor& prototypes, const OptionalTensor& positive, const Tensors& tensors,
    at::IntArrayRef integers, at::ArrayRef<double> numbers, Text backend) {
  refuse_forward_mode({embedding, prototypes, positive});
  static const auto loss_by = find_operator<LossBy>("margin_softmax");
  const bool records = at::GradMode::is_enabled();
  const bool for_embedding = records && embedding.requires_grad();
  const bool for_prototypes = records && prototypes.requires_grad();
  const bool for_positive = records && wants_gradient(positive);
  Arguments named(embedding, prototypes, positive, tensors, integers, numbers);
  const bool for_scale = records && wants_gradient(named.scale_rows);
  c10::SmallVector<int64_t, 10> flags(integers.begin(), integers.end());
  // need_gradient and, before it, need_scale_gradient; a compiled graph has asked already, and runs without recording.
  flags.back() = flags.back() || for_embedding;
  flags.end()[-2] = flags.end()[-2] || for_scale;
  ResultTuple results = [&] {
    const at::AutoDispatchBelowADInplaceOrView below;
    return loss_by.call(embedding, prototypes, positive, tensors, flags, numbers, backend);
  }();
  if (!for_embedding && !for_prototypes && !for_positive && !for_scale) return results;
  auto node = make_node<MarginSoftmaxBackward>();
  node->set_next_edges(
      autograd::collect_next_edges(
          embedding, prototypes, positive.value_or(at::Tensor()), named.scale_rows.value_or(at::Tensor())));
  node->embedding = autograd::SavedVariable(embedding, false);
  node->row_weight = autograd::SavedVariable(std::get<7>(results), false);
  if (for_embedding) node->gradient = autograd::SavedVariable(std::get<8>(results), false);
  if (for_prototypes || for_positive) {
    node->positive = autograd::SavedVariable(positive ? *positive : at::Tensor(), false);
    node->target_slope = autograd::SavedVariable(std::get<10>(results), false);
    node->normalize = named.normalize;
  }
  if (for_prototypes) {
    node->prototypes = autograd::SavedVariable(prototypes, false);
    node->lse = autograd::SavedVariable(std::get<1>(results), false);
    node->negatives = autograd::SavedVariable(std::get<9>(results), false);
    node->kept = autograd::SavedVariable(std::get<12>(results), false);
    for (const OptionalTensor& t : tensors) node->tensors.emplace_back(t ? *t : at::Tensor(), false);
    node->integers.assign(flags.begin(), flags.end());
    node->numbers.assign(numbers.begin(), numbers.end());
    node->backend = std::string(backend);
  }
  if (for_scale) {
    node->scale = autograd::SavedVariable(*named.scale_rows, false);
    node->scale_slope = autograd::SavedVariable(std::get<11>(results), false);
  }
  autograd::set_history(std::get<0>(results), NodePointer(std::move(node)));
  return results;
}

template <typename Signature, typename... Inputs>
at::Tensor below(const char* name, const Inputs&... inputs) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return find_operator<Signature>(name).call(inputs...);
}

at::Tensor margin_softmax_backward_autograd(
    const at::Tensor& grad_loss, const at::Tensor& row_weight, const at::Tensor& gradient,
    const at::Tensor& embedding) {
  at::Tensor out =
      below<decltype(margin_softmax_backward)>("margin_softmax_backward", grad_loss, row_weight, gradient, embedding);
  refuse_second_derivative(out, {grad_loss, gradient, embedding});
  return out;
}

at::Tensor positive_gradient_autograd(
    const at::Tensor& grad_loss, const at::Tensor& row_weight, const at::Tensor& target_slope,
    const at::Tensor& embedding, const at::Tensor& positive, bool normalize) {
  at::Tensor out = below<decltype(positive_gradient)>(
      "positive_gradient", grad_loss, row_weight, target_slope, embedding, positive, normalize);
  refuse_second_derivative(out, {grad_loss, embedding, positive});
  return out;
}

at::Tensor prototype_gradient_autograd(
    const at::Tensor& grad_loss, at::TensorList found, const at::Tensor& embedding, const at::Tensor& prototypes,
    const OptionalTensor& positive, const Tensors& tensors, at::IntArrayRef integers, at::ArrayRef<double> numbers,
    Text backend) {
  at::Tensor out = below<GradientBy>(
      "prototype_gradient", grad_loss, found, embedding, prototypes, positive, tensors, integers, numbers, backend);
  refuse_second_derivative(out, {grad_loss, embedding, prototypes, positive});
  return out;
}

WindowTensors window_autograd(
    at::TensorList groups, const at::Tensor& identities, const at::Tensor& state, int64_t size, at::ScalarType dtype) {
  const at::AutoDispatchBelowADInplaceOrView guard;  // its results are constants
  static const auto window = find_operator<decltype(cpu::window)>("window");
  return window.call(groups, identities, state, size, dtype);
}

// --- the queue -------------------------------------------------------------------------------------------------------

void enqueue_shapes(
    const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&, at::Tensor&, bool, const OptionalTensor&) {}

at::Tensor dequeue_shape(int64_t count, at::Tensor& queue_identities, at::Tensor&) {
  return at::empty({count}, queue_identities.options());
}

WindowTensors window_shapes(
    at::TensorList groups, const at::Tensor& identities, const at::Tensor& state, int64_t, at::ScalarType dtype) {
  const c10::SymInt H(static_cast<int64_t>(groups.size())), B = identities.sym_size(0);
  const auto numbers = [&](c10::SymIntArrayRef shape) { return at::empty_symint(shape, state.options()); };
  return {
      at::empty_symint({H, B, groups[0].sym_size(1)}, groups[0].options().dtype(dtype)), numbers({}), numbers({H * B}),
      numbers({H * B}), numbers({B})};
}

void count_scores_shapes(const at::Tensor&, const at::Tensor&, at::Tensor&, at::Tensor&) {}

BestTensors best_scores_shapes(
    const at::Tensor& scores, const at::Tensor& wanted_rows, const at::Tensor& wanted_columns) {
  const auto numbers = scores.options().dtype(at::kInt);
  const c10::SymInt R = scores.sym_size(0), C = scores.sym_size(1);
  return {
      at::empty_symint({R}, scores.options()), at::empty_symint({R}, numbers), at::empty_symint({C}, scores.options()),
      at::empty_symint({C}, numbers)};
}

// The window in PyTorch's own operations, where there is no kernel for the device.
WindowTensors window_plain(
    at::TensorList groups, const at::Tensor& identities, const at::Tensor& state, int64_t size, at::ScalarType dtype) {
  const int64_t H = groups.size();
  const auto [unit, norm] = unit_rows(at::stack(groups));
  const at::Tensor start = state.select(0, kPosition).clone();
  const at::Tensor slots = (start + at::arange(identities.size(0), state.options())).remainder(size);
  const at::Tensor finite = norm.squeeze(-1).isfinite().all(0);
  return {unit.to(dtype), start, slots.repeat({H}), identities.repeat({H}), at::where(finite, identities, -1)};
}

}  // namespace

ResultTuple call_margin_softmax(
    const at::Tensor& embedding, const at::Tensor& prototypes, const OptionalTensor& positive,
    const std::vector<OptionalTensor>& tensors, const std::vector<int64_t>& integers,
    const std::vector<double>& numbers, const std::string& backend) {
  static const auto loss_by = find_operator<LossBy>("margin_softmax");
  return loss_by.call(embedding, prototypes, positive, Tensors(tensors), integers, numbers, backend);
}

WindowTensors call_window(
    const std::vector<at::Tensor>& groups, const at::Tensor& identities, const at::Tensor& state, int64_t size,
    at::ScalarType dtype) {
  static const auto window = find_operator<decltype(cpu::window)>("window");
  return window.call(groups, identities, state, size, dtype);
}

void call_enqueue(
    const at::Tensor& features, const at::Tensor& identities, at::Tensor& queue, at::Tensor& queue_identities,
    at::Tensor& state, bool unit, const OptionalTensor& group) {
  static const auto enqueue = find_operator<decltype(cpu::enqueue)>("enqueue");
  enqueue.call(features, identities, queue, queue_identities, state, unit, group);
}

#define SST_LOSS \
  "Tensor embedding, Tensor prototypes, Tensor? positive, Tensor?[] tensors, int[] integers, float[] numbers"
#define SST_RESULTS                                                                                                   \
  "(Tensor loss, Tensor lse, Tensor target_cosine, Tensor hardest_cosine, Tensor hardest_slot, Tensor beats_target, " \
  "Tensor residual, Tensor row_weight, Tensor gradient, Tensor negatives, Tensor target_slope, Tensor scale_slope, "  \
  "Tensor kept)"

TORCH_LIBRARY(sst_fast, m) {
  m.def("margin_softmax(" SST_LOSS ", str backend) -> " SST_RESULTS);
  m.def("prototype_gradient(Tensor grad_loss, Tensor[] found, " SST_LOSS ", str backend) -> Tensor");
  m.def("margin_softmax_backward(Tensor grad_loss, Tensor row_weight, Tensor gradient, Tensor embedding) -> Tensor");
  m.def(
      "positive_gradient(Tensor grad_loss, Tensor row_weight, Tensor target_slope, Tensor embedding, Tensor positive, "
      "bool normalize) -> Tensor");
  // Triton's kernels are launched from Python, which registers these when they are first chosen.
  for (const std::string name : {"triton", "staged"}) {
    m.def((name + "_margin_softmax(" SST_LOSS ") -> " SST_RESULTS).c_str());
    m.def((name + "_prototype_gradient(Tensor grad_loss, Tensor[] found, " SST_LOSS ") -> Tensor").c_str());
  }
  // What the queue's operators take and give: ops.h.
  m.def(
      "enqueue(Tensor features, Tensor identities, Tensor(a!) queue, Tensor(b!) queue_identities, Tensor(c!) state, "
      "bool unit=False, Tensor? group=None) -> ()");
  m.def("dequeue(int count, Tensor(a!) queue_identities, Tensor(b!) state) -> Tensor");
  m.def(
      "window(Tensor[] groups, Tensor identities, Tensor state, int size, ScalarType dtype) -> "
      "(Tensor unit, Tensor start, Tensor targets, Tensor owners, Tensor held)");
  m.def("count_scores(Tensor scores, Tensor slots, Tensor(a!) by_bin, Tensor(b!) by_value) -> ()");
  m.def(
      "best_scores(Tensor scores, Tensor wanted_rows, Tensor wanted_columns) -> "
      "(Tensor of_rows, Tensor ahead_of_rows, Tensor of_columns, Tensor ahead_of_columns)");
}

TORCH_LIBRARY_IMPL(sst_fast, CompositeExplicitAutograd, m) {
  m.impl("margin_softmax", &margin_softmax);
  m.impl("prototype_gradient", &prototype_gradient);
  m.impl("margin_softmax_backward", &margin_softmax_backward);
  m.impl("positive_gradient", &positive_gradient);
  m.impl("window", &window_plain);
}

TORCH_LIBRARY_IMPL(sst_fast, Meta, m) {
  m.impl("margin_softmax", &margin_softmax_shapes);
  m.impl("prototype_gradient", &prototype_gradient_shape);
  m.impl("margin_softmax_backward", &margin_softmax_backward_shape);
  m.impl("positive_gradient", &positive_gradient_shape);
  m.impl("enqueue", &enqueue_shapes);
  m.impl("dequeue", &dequeue_shape);
  m.impl("window", &window_shapes);
  m.impl("count_scores", &count_scores_shapes);
  m.impl("best_scores", &best_scores_shapes);
}

TORCH_LIBRARY_IMPL(sst_fast, Autograd, m) {
  m.impl("margin_softmax", &margin_softmax_autograd);
  m.impl("window", &window_autograd);
  m.impl("prototype_gradient", &prototype_gradient_autograd);
  m.impl("margin_softmax_backward", &margin_softmax_backward_autograd);
  m.impl("positive_gradient", &positive_gradient_autograd);
}

TORCH_LIBRARY_IMPL(sst_fast, CPU, m) {
  m.impl("enqueue", &cpu::enqueue);
  m.impl("dequeue", &cpu::dequeue);
  m.impl("window", &cpu::window);
  m.impl("count_scores", &cpu::count_scores);
  m.impl("best_scores", &cpu::best_scores);
}
#ifdef SST_FAST_CUDA
TORCH_LIBRARY_IMPL(sst_fast, CUDA, m) {
  m.impl("enqueue", &cuda::enqueue);
  m.impl("dequeue", &cuda::dequeue);
  m.impl("window", &cuda::window);
}
#endif

}  // namespace sst_fast
