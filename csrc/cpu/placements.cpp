// Where tensors are and how they are laid out, remembered, so that a plan which keeps addresses can
// tell before each step whether they still hold. Looks at no element; any device's tensors will do.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "checks.h"
#include "handles.h"

namespace fastfreeze {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// torch's own macro for this has another name in each of its versions.
void check(AOTITorchError error) {
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "torch could not tell about a tensor");
}

struct Placements {
  static constexpr const char* kName = "record of placements";
  std::vector<int64_t> facts;  // of each tensor: address, Facts, sizes and strides
  std::vector<size_t> begin;
  std::vector<Tensor> kept;
};

// A tensor of a list, for as long as it is looked at. torch's own class for it would take as long
// again, and more than all the rest of a small network's step.
class Item {
 public:
  Item(StableListHandle list, size_t index) {
    StableIValue item;
    check(torch_list_get_item(list, index, &item));
    tensor_ = to<AtenTensorHandle>(item);
  }
  Item(const Item&) = delete;
  Item& operator=(const Item&) = delete;
  ~Item() { aoti_torch_delete_tensor_object(tensor_); }
  AtenTensorHandle get() const { return tensor_; }

 private:
  AtenTensorHandle tensor_;
};

// An operator's argument.
class TensorList {
 public:
  explicit TensorList(StableIValue list) : list_(to<StableListHandle>(list)) {}
  TensorList(const TensorList&) = delete;
  TensorList& operator=(const TensorList&) = delete;
  ~TensorList() { torch_delete_list(list_); }

  size_t size() const {
    size_t size;
    check(torch_list_size(list_, &size));
    return size;
  }
  Item operator[](size_t index) const { return Item(list_, index); }

 private:
  StableListHandle list_;
};

int64_t address_of(AtenTensorHandle t) {
  void* data;
  check(aoti_torch_get_data_ptr(t, &data));
  return reinterpret_cast<int64_t>(data);
}

bool is_strided(AtenTensorHandle t) {
  static const int32_t strided = aoti_torch_layout_strided();
  int32_t layout;
  check(aoti_torch_get_layout(t, &layout));
  return layout == strided;
}

struct Facts {
  int32_t dtype, device_type, device_index;
  int64_t dim;
};

Facts facts_of(AtenTensorHandle t) {
  Facts facts;
  check(aoti_torch_get_dtype(t, &facts.dtype));
  check(aoti_torch_get_device_type(t, &facts.device_type));
  check(aoti_torch_get_device_index(t, &facts.device_index));
  check(aoti_torch_get_dim(t, &facts.dim));
  return facts;
}

// Whether a strided tensor has the dtype, sizes and strides of those facts. A stride that leads
// from an element to none does not count.
bool is_like(AtenTensorHandle t, const int64_t* facts) {
  int32_t dtype;
  int64_t dim;
  check(aoti_torch_get_dtype(t, &dtype));
  check(aoti_torch_get_dim(t, &dim));
  if (dtype != facts[1] || dim != facts[4]) return false;
  int64_t *sizes, *strides;
  check(aoti_torch_get_sizes(t, &sizes));
  check(aoti_torch_get_strides(t, &strides));
  facts += 5;
  for (int64_t d = 0; d < dim; ++d) {
    if (sizes[d] != facts[d]) return false;
    if (sizes[d] > 1 && strides[d] != facts[dim + d]) return false;
  }
  return true;
}

int64_t placements(std::vector<Tensor> tensors, bool keep) {
  auto made = std::make_shared<Placements>();
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(is_strided(t.get()), "tensors must be strided");
    const auto [dtype, device_type, device_index, dim] = facts_of(t.get());
    const auto sizes = t.sizes(), strides = t.strides();
    std::vector<int64_t>& facts = made->facts;
    made->begin.push_back(facts.size());
    facts.insert(facts.end(), {address_of(t.get()), dtype, device_type, device_index, dim});
    facts.insert(facts.end(), sizes.begin(), sizes.end());
    facts.insert(facts.end(), strides.begin(), strides.end());
  }
  if (keep) made->kept = std::move(tensors);
  return Handles<Placements>::all().add(std::move(made));
}

// The device, too; where addresses are compared they tell it.
bool is_on_device(AtenTensorHandle t, const int64_t* facts) {
  int32_t type, index;
  check(aoti_torch_get_device_type(t, &type));
  check(aoti_torch_get_device_index(t, &index));
  return type == facts[2] && index == facts[3];
}

bool is_in_place(AtenTensorHandle t, const int64_t* facts) {
  return is_strided(t) && address_of(t) == facts[0] && is_like(t, facts);
}

// Whether the tensors that were kept are unmoved. A strided one stays strided.
bool kept_hold(const Placements& known) {
  for (size_t i = 0; i < known.kept.size(); ++i) {
    const AtenTensorHandle t = known.kept[i].get();
    const int64_t* facts = known.facts.data() + known.begin[i];
    if (address_of(t) != facts[0] || !is_like(t, facts)) return false;
  }
  return true;
}

// Whether tensors are those remembered, unmoved. index: which of them each is.
bool hold(const Placements& known, const TensorList& tensors, const int64_t* index) {
  const size_t count = tensors.size();
  for (size_t i = 0; i < count; ++i) {
    const Item t = tensors[i];
    if (!is_in_place(t.get(), known.facts.data() + known.begin[index[i]])) return false;
  }
  return true;
}

// Whether its elements are somewhere: a tensor of zeros may have no memory.
bool has_memory(AtenTensorHandle t, int64_t address) {
  if (address != 0) return true;
  int64_t numel;
  check(aoti_torch_get_numel(t, &numel));
  return numel == 0;
}

// Whether tensors are like those remembered, wherever they are. addresses: by that index, theirs.
bool gather(const Placements& known, const TensorList& tensors, const int64_t* index,
            int64_t* addresses) {
  const size_t count = tensors.size();
  for (size_t i = 0; i < count; ++i) {
    const Item t = tensors[i];
    const int64_t* facts = known.facts.data() + known.begin[index[i]];
    if (!is_strided(t.get()) || !is_like(t.get(), facts) || !is_on_device(t.get(), facts)) {
      return false;
    }
    const int64_t address = address_of(t.get());
    if (!has_memory(t.get(), address)) return false;
    addresses[index[i]] = address;
  }
  return true;
}

// The memory that a step writes, as stretches by their begins, and the gap between two of them in
// which each gradient was last: most stay there, and need not be searched for.
struct Gaps {
  static constexpr const char* kName = "record of gaps";
  std::vector<int64_t> begins;
  std::vector<int64_t> ends;   // of all stretches before and with each
  std::vector<int64_t> sizes;  // of the gradients, in bytes
  std::vector<int64_t> low, high;
};

// written: int64 [n, 2], begins and ends by begin; sizes: int64 [gradients, 1].
int64_t gaps(Tensor written, Tensor sizes) {
  check_table(written, "written", ScalarType::Long, 2, true);
  check_table(sizes, "sizes", ScalarType::Long, 1, true);
  auto made = std::make_shared<Gaps>();
  const auto* stretch = static_cast<const int64_t*>(written.data_ptr());
  int64_t end = 0;
  for (int64_t i = 0; i < written.size(0); ++i, stretch += 2) {
    made->begins.push_back(stretch[0]);
    made->ends.push_back(end = std::max(end, stretch[1]));
  }
  const auto* size = static_cast<const int64_t*>(sizes.data_ptr());
  made->sizes.assign(size, size + sizes.size(0));
  made->low.resize(made->sizes.size());
  made->high.resize(made->sizes.size());
  return Handles<Gaps>::all().add(std::move(made));
}

void gaps_free(int64_t handle) { Handles<Gaps>::all().remove(handle); }

// Whether dense gradients at these addresses, 0 for none, lie outside of what is written.
bool are_clear(Gaps& gaps, const int64_t* addresses) {
  for (size_t i = 0; i < gaps.sizes.size(); ++i) {
    const int64_t begin = addresses[i], end = begin + gaps.sizes[i];
    if (begin == 0 || begin == end || (gaps.low[i] <= begin && end <= gaps.high[i])) continue;
    const auto next = std::upper_bound(gaps.begins.begin(), gaps.begins.end(), begin);
    const size_t before = next - gaps.begins.begin();
    gaps.low[i] = before == 0 ? 0 : gaps.ends[before - 1];
    gaps.high[i] = next == gaps.begins.end() ? INT64_MAX : *next;
    if (begin < gaps.low[i] || end > gaps.high[i]) return false;
  }
  return true;
}

// What a look before a step finds; fastfreeze/kernels/placements.py names them likewise.
enum Found : int64_t { kAsPlanned, kMoved, kOtherGradients, kNotClear };

Found look(const Placements& planned, const Placements& buffers, Gaps& gaps,
           const TensorList& params, const TensorList& grads, const int64_t* index,
           int64_t* addresses) {
  if (!hold(planned, params, index) || !kept_hold(buffers)) return kMoved;
  if (!gather(planned, grads, index, addresses)) return kOtherGradients;
  return are_clear(gaps, addresses) ? kAsPlanned : kNotClear;
}

// placements_look(int planned, int buffers, int gaps, Tensor[] params, Tensor[] grads, int index,
// int addresses) -> int, a Found. planned: placements of all parameters; buffers: of momentum
// buffers, kept; params, grads: of the parameters that index names; addresses: address of int64
// [parameters], receives the gradients'.
void placements_look(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[3]), grads(stack[4]);
  const auto planned = Handles<Placements>::all().get(to<int64_t>(stack[0]));
  const auto buffers = Handles<Placements>::all().get(to<int64_t>(stack[1]));
  const auto gaps = Handles<Gaps>::all().get(to<int64_t>(stack[2]));
  const auto* index = reinterpret_cast<const int64_t*>(to<int64_t>(stack[5]));
  auto* addresses = reinterpret_cast<int64_t*>(to<int64_t>(stack[6]));
  stack[0] =
      from(static_cast<int64_t>(look(*planned, *buffers, *gaps, params, grads, index, addresses)));
}

void placements_free(int64_t handle) { Handles<Placements>::all().remove(handle); }

// What torch calls instead where a tensor's memory does not hold its values: those of a negated or
// conjugated view, or of zeros by a flag. Otherwise it would hand over a temporary one.
int64_t placements_of_no_values(std::vector<Tensor>, bool) {
  STD_TORCH_CHECK(false, "tensors must hold their values in memory");
}

// Whether it is a parameter or a gradient, Python has to find out.
void look_at_no_values(StableIValue* stack, uint64_t, uint64_t) {
  const TensorList params(stack[3]), grads(stack[4]);
  stack[0] = from(static_cast<int64_t>(kOtherGradients));
}

template <typename Library>
void implement_for_no_values(Library& m) {
  m.impl("placements", TORCH_BOX(&placements_of_no_values));
  m.impl("placements_look", &look_at_no_values);
}

}  // namespace
}  // namespace fastfreeze

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, Negative, m) { fastfreeze::implement_for_no_values(m); }
STABLE_TORCH_LIBRARY_IMPL(fastfreeze, Conjugate, m) { fastfreeze::implement_for_no_values(m); }
STABLE_TORCH_LIBRARY_IMPL(fastfreeze, ZeroTensor, m) { fastfreeze::implement_for_no_values(m); }

STABLE_TORCH_LIBRARY_IMPL(fastfreeze, CompositeExplicitAutograd, m) {
  m.impl("placements", TORCH_BOX(&fastfreeze::placements));
  m.impl("placements_look", &fastfreeze::placements_look);
  m.impl("placements_free", TORCH_BOX(&fastfreeze::placements_free));
  m.impl("gaps", TORCH_BOX(&fastfreeze::gaps));
  m.impl("gaps_free", TORCH_BOX(&fastfreeze::gaps_free));
}
