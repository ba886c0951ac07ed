// In place of libtorch's own unpickler (torch/csrc/jit/serialization/unpickler.h), which was tried with
// callbacks for types and records: it reads what C++ pickles and stops at integers that Python writes in
// fewer than eight bytes, as in tests/golden/state_dict.bin.

#include "stbllm/checkpoint/pickle.h"

#include <ATen/ATen.h>

#include <bit>
#include <cstring>
#include <deque>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>

#include "stbllm/base/error.h"

namespace stbllm {
namespace {

// --- the white list ------------------------------------------------------------------------------------

enum class Function { kOrderedDict, kRebuildTensor, kRebuildParameter };
struct Global {
  std::variant<Function, at::ScalarType> meaning;  // for a storage type that of its elements
};

const std::map<std::string, Global, std::less<>> kGlobals = {
    {"collections.OrderedDict", {Function::kOrderedDict}},
    {"torch._utils._rebuild_tensor_v2", {Function::kRebuildTensor}},
    {"torch._utils._rebuild_parameter", {Function::kRebuildParameter}},
    {"torch.FloatStorage", {at::kFloat}},
    {"torch.HalfStorage", {at::kHalf}},
    {"torch.BFloat16Storage", {at::kBFloat16}},
    {"torch.DoubleStorage", {at::kDouble}},
    {"torch.LongStorage", {at::kLong}},
    {"torch.IntStorage", {at::kInt}},
    {"torch.ShortStorage", {at::kShort}},
    {"torch.CharStorage", {at::kChar}},
    {"torch.ByteStorage", {at::kByte}},
    {"torch.BoolStorage", {at::kBool}},
};

// The operations of pickle protocol 2 that torch.save's pickler emits for a state_dict.
enum class Op : uint8_t {
  kMark = '(',
  kStop = '.',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kNone = 'N',
  kBinPersId = 'Q',
  kReduce = 'R',
  kBinUnicode = 'X',
  kBinFloat = 'G',
  kAppend = 'a',
  kBuild = 'b',
  kGlobal = 'c',
  kAppends = 'e',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinPut = 'q',
  kLongBinPut = 'r',
  kSetItem = 's',
  kTuple = 't',
  kSetItems = 'u',
  kEmptyTuple = ')',
  kEmptyList = ']',
  kEmptyDict = '}',
  kProto = 0x80,
  kTuple1 = 0x85,
  kTuple2 = 0x86,
  kTuple3 = 0x87,
  kNewTrue = 0x88,
  kNewFalse = 0x89,
  kLong1 = 0x8a,
};

// --- values --------------------------------------------------------------------------------------------

// Values live in one arena and refer to each other by index. A pickle that nests deeply then costs no
// recursion, and one that holds itself costs no leak.
using Ref = size_t;
struct None {};
struct Sequence {  // tuple or list
  std::vector<Ref> items;
};
struct Dict {
  std::vector<std::pair<Ref, Ref>> items;
};
struct Storage {
  at::ScalarType dtype;
  std::string key;
  int64_t numel;
};
// Floating-point numbers appear only beside the tensors, so that they are None here.
using Value = std::variant<None, int64_t, std::string, Global, Sequence, Dict, Storage, PickledTensor>;

// A pickle can name a value again in two bytes, and what it builds then is copied. These bounds keep a small
// file from asking for much memory in that way.
constexpr size_t kMostDimensions = 64, kLongestName = 255;

class Unpickler {
 public:
  Unpickler(std::span<const std::byte> data, const std::string& file) : data_(data), file_(file) {}

  std::map<std::string, PickledTensor> run() {
    while (step()) {
    }
    std::map<std::string, PickledTensor> tensors;
    for (const auto& [key, value] : get<Dict>(pop()).items) {
      const auto* tensor = std::get_if<PickledTensor>(&values_[value]);
      if (tensor && !tensors.emplace(get<std::string>(key), *tensor).second)
        corrupt("tensor " + get<std::string>(key) + " is there twice");
    }
    return tensors;
  }

 private:
  [[noreturn]] void corrupt(std::string_view what) const {
    fail(ErrorCode::kCorrupt, "{}: damaged pickle at byte {}: {}", file_, at_, what);
  }

  // Input.
  std::span<const std::byte> read(size_t count) {
    if (count > data_.size() - at_) corrupt("it ends in the middle of an operation");
    at_ += count;
    return data_.subspan(at_ - count, count);
  }
  template <typename T>
  T read() {
    T value;
    std::memcpy(&value, read(sizeof(T)).data(), sizeof(T));
    return value;
  }
  std::string read_text(size_t count) {
    const auto bytes = read(count);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
  std::string read_line() {
    std::string line;
    for (char c = read<char>(); c != '\n'; c = read<char>()) {
      if (line.size() == kLongestName) corrupt("the name of a global is too long");
      line.push_back(c);
    }
    return line;
  }

  // Stack.
  void push(Value value) {
    values_.push_back(std::move(value));
    stack_.push_back(values_.size() - 1);
  }
  Ref pop() {
    if (stack_.size() <= (marks_.empty() ? 0 : marks_.back())) corrupt("the stack is empty");
    const Ref top = stack_.back();
    stack_.pop_back();
    return top;
  }
  Ref top() {
    const Ref ref = pop();
    stack_.push_back(ref);
    return ref;
  }
  std::vector<Ref> pop_to_mark() {
    if (marks_.empty()) corrupt("a mark is missing");
    const auto first = stack_.begin() + static_cast<ptrdiff_t>(marks_.back());
    std::vector<Ref> items(first, stack_.end());
    stack_.erase(first, stack_.end());
    marks_.pop_back();
    return items;
  }
  void push_tuple(size_t count) {
    std::vector<Ref> items(count);
    for (size_t i = count; i-- > 0;) items[i] = pop();
    push(Sequence{std::move(items)});
  }
  template <typename T>
  T& get(Ref ref) {
    T* value = std::get_if<T>(&values_[ref]);
    if (!value) corrupt("a value has another type than its use demands");
    return *value;
  }
  std::vector<int64_t> integers(Ref ref) {
    const std::vector<Ref>& items = get<Sequence>(ref).items;
    if (items.size() > kMostDimensions) corrupt("a tensor of more than 64 dimensions");
    std::vector<int64_t> result;
    for (Ref item : items) result.push_back(get<int64_t>(item));
    return result;
  }
  void append(const std::vector<Ref>& items) {
    auto& list = get<Sequence>(top()).items;
    list.insert(list.end(), items.begin(), items.end());
  }
  void set_items(Dict& dict, const std::vector<Ref>& items) {
    if (items.size() % 2) corrupt("a key without a value");
    for (size_t i = 0; i < items.size(); i += 2) dict.items.emplace_back(items[i], items[i + 1]);
  }

  // What the listed functions do.
  /// `id` is ("storage", type, key, location, number of elements).
  Storage load_storage(const Sequence& id) {
    if (id.items.size() != 5 || get<std::string>(id.items[0]) != "storage") corrupt("expected a storage");
    const auto* dtype = std::get_if<at::ScalarType>(&get<Global>(id.items[1]).meaning);
    if (!dtype) corrupt("expected a storage type");
    const std::string& key = get<std::string>(id.items[2]);
    if (key.size() > kLongestName) corrupt("the key of a storage is too long");
    return {*dtype, key, get<int64_t>(id.items[4])};
  }

  /// The arguments are (storage, offset, shape, strides, ...).
  PickledTensor rebuild_tensor(const Sequence& arguments) {
    if (arguments.items.size() < 4) corrupt("expected storage, offset, shape and strides of a tensor");
    const Storage& storage = get<Storage>(arguments.items[0]);
    PickledTensor tensor{.dtype = storage.dtype,
                         .storage = storage.key,
                         .storage_numel = storage.numel,
                         .offset = get<int64_t>(arguments.items[1]),
                         .shape = integers(arguments.items[2]),
                         .strides = integers(arguments.items[3])};
    if (tensor.offset < 0 || tensor.offset > tensor.storage_numel ||
        tensor.shape.size() != tensor.strides.size()) {
      corrupt("impossible shape of a tensor");
    }
    int64_t numel = 1, last = tensor.offset;  // where the last element is in the storage
    bool fits = true, empty = false;
    for (size_t i = 0; i < tensor.shape.size(); ++i) {
      int64_t reach;
      if (tensor.shape[i] < 0 || tensor.strides[i] < 0) corrupt("impossible shape of a tensor");
      fits &= !__builtin_mul_overflow(tensor.shape[i] - 1, tensor.strides[i], &reach);
      fits &= !__builtin_add_overflow(last, reach, &last);
      fits &= !__builtin_mul_overflow(numel, tensor.shape[i], &numel);
      empty |= tensor.shape[i] == 0;
    }
    if (!fits || (!empty && last >= tensor.storage_numel)) corrupt("a tensor does not fit into its storage");
    return tensor;
  }

  void reduce() {
    const Sequence arguments = get<Sequence>(pop());
    const auto* function = std::get_if<Function>(&get<Global>(pop()).meaning);
    if (!function) corrupt("a call of something that is no function");
    switch (*function) {
      case Function::kOrderedDict:
        if (!arguments.items.empty()) corrupt("expected an empty OrderedDict");
        return push(Dict{});
      case Function::kRebuildTensor:
        return push(rebuild_tensor(arguments));
      case Function::kRebuildParameter:  // (tensor, requires_grad, hooks)
        if (arguments.items.empty()) corrupt("expected the tensor of a parameter");
        return push(get<PickledTensor>(arguments.items[0]));
    }
  }

  Global find_global() {
    std::string name = read_line();
    name += '.' + read_line();
    const auto found = kGlobals.find(name);
    if (found == kGlobals.end()) {
      fail(ErrorCode::kUnsupported,
           "{}: the pickle names \"{}\", which is not among the few things a state_dict of tensors needs; "
           "save model.state_dict() alone, or as safetensors",
           file_, name);
    }
    return found->second;
  }

  /// A little-endian two's complement of any length, of which torch needs at most 8 bytes.
  int64_t read_long() {
    const auto bytes = read(read<uint8_t>());
    if (bytes.size() > 8) corrupt("an integer of more than 64 bits");
    if (bytes.empty()) return 0;
    const bool negative = std::to_integer<int>(bytes.back()) & 0x80;
    uint64_t value = negative ? ~uint64_t{0} : 0;
    std::memcpy(&value, bytes.data(), bytes.size());
    return static_cast<int64_t>(value);
  }

  void recall(uint32_t slot) {
    const auto found = memo_.find(slot);
    if (found == memo_.end()) corrupt("it recalls a value that it never stored");
    stack_.push_back(found->second);
  }

  /// Does one operation; false at the end of the pickle.
  bool step() {
    const Op op = read<Op>();
    if (op == Op::kStop) return false;
    if (!push_literal(op) && !fill_container(op) && !use_memo(op) && !make_object(op)) {
      fail(ErrorCode::kUnsupported,
           "{}: the pickle uses operation 0x{:02x}, which a state_dict of tensors does not need", file_,
           static_cast<int>(op));
    }
    return true;
  }

  // The operations by kind. Each function says whether `op` is one of its kind, and does it then.

  bool push_literal(Op op) {
    switch (op) {
      case Op::kNone:
        push(None{});
        return true;
      case Op::kNewTrue:
        push(int64_t{1});
        return true;
      case Op::kNewFalse:
        push(int64_t{0});
        return true;
      case Op::kBinInt:
        push(int64_t{read<int32_t>()});
        return true;
      case Op::kBinInt1:
        push(int64_t{read<uint8_t>()});
        return true;
      case Op::kBinInt2:
        push(int64_t{read<uint16_t>()});
        return true;
      case Op::kLong1:
        push(read_long());
        return true;
      case Op::kBinFloat:
        read(8);
        push(None{});
        return true;
      case Op::kBinUnicode:
        push(read_text(read<uint32_t>()));
        return true;
      default:
        return false;
    }
  }

  bool fill_container(Op op) {
    switch (op) {
      case Op::kMark:
        marks_.push_back(stack_.size());
        return true;
      case Op::kEmptyTuple:
      case Op::kEmptyList:
        push(Sequence{});
        return true;
      case Op::kTuple1:
        push_tuple(1);
        return true;
      case Op::kTuple2:
        push_tuple(2);
        return true;
      case Op::kTuple3:
        push_tuple(3);
        return true;
      case Op::kTuple:
        push(Sequence{pop_to_mark()});
        return true;
      case Op::kEmptyDict:
        push(Dict{});
        return true;
      case Op::kAppend:
        append({pop()});
        return true;
      case Op::kAppends:
        append(pop_to_mark());
        return true;
      case Op::kSetItem: {
        const Ref value = pop(), key = pop();
        set_items(get<Dict>(top()), {key, value});
        return true;
      }
      case Op::kSetItems: {
        const std::vector<Ref> items = pop_to_mark();
        set_items(get<Dict>(top()), items);
        return true;
      }
      default:
        return false;
    }
  }

  bool use_memo(Op op) {
    switch (op) {
      case Op::kBinPut:
        memo_[read<uint8_t>()] = top();
        return true;
      case Op::kLongBinPut:
        memo_[read<uint32_t>()] = top();
        return true;
      case Op::kBinGet:
        recall(read<uint8_t>());
        return true;
      case Op::kLongBinGet:
        recall(read<uint32_t>());
        return true;
      default:
        return false;
    }
  }

  bool make_object(Op op) {
    switch (op) {
      case Op::kProto:
        if (const int version = read<uint8_t>(); version != 2) {
          fail(ErrorCode::kUnsupported,
               "{}: pickle protocol {}; torch.save writes protocol 2 unless told otherwise", file_, version);
        }
        return true;
      case Op::kGlobal:
        push(find_global());
        return true;
      case Op::kBinPersId:
        push(load_storage(get<Sequence>(pop())));
        return true;
      case Op::kReduce:
        reduce();
        return true;
      case Op::kBuild:  // It sets the attributes of a state_dict, its _metadata, which nobody needs here.
        pop();
        get<Dict>(top());
        return true;
      default:
        return false;
    }
  }

  std::span<const std::byte> data_;
  const std::string& file_;
  size_t at_ = 0;
  std::deque<Value> values_;  // of which references stay valid while values are added
  std::vector<Ref> stack_;
  std::vector<size_t> marks_;  // heights of the stack
  std::unordered_map<uint32_t, Ref> memo_;
};

}  // namespace

std::map<std::string, PickledTensor> read_state_dict(std::span<const std::byte> pickle,
                                                     const std::string& file) {
  return Unpickler(pickle, file).run();
}

}  // namespace stbllm
