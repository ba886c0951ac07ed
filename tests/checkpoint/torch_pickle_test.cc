#include <ATen/ATen.h>
#include <caffe2/serialize/inline_container.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include "stbllm/base/error.h"
#include "stbllm/checkpoint/pickle.h"
#include "stbllm/checkpoint/sources.h"
#include "support/expect_error.h"
#include "support/files.h"
#include "support/scratch_directory.h"

// libtorch's zip reader leaks its directory when it finds a damaged archive.
extern "C" const char* __lsan_default_suppressions() { return "leak:mz_zip_reader_"; }

namespace stbllm {
namespace {

namespace fs = std::filesystem;
using test::expect_error;
using test::read_all;
using test::ScratchDirectory;
using test::write_all;

// --- a pickle by hand ------------------------------------------------------------------------------------

/// Emits operations of pickle protocol 2.
class Pickle {
 public:
  Pickle() { raw({"\x80\x02", 2}); }
  Pickle& raw(std::string_view bytes) {
    bytes_ += bytes;
    return *this;
  }
  Pickle& global(const std::string& module, const std::string& name) {
    return raw("c" + module + "\n" + name + "\n");
  }
  Pickle& text(const std::string& value) { return raw("X").little_endian(value.size(), 4).raw(value); }
  Pickle& integer(int64_t value) { return raw({"\x8a\x08", 2}).little_endian(value, 8); }
  Pickle& tuple(const std::vector<int64_t>& values) {
    raw("(");
    for (int64_t value : values) integer(value);
    return raw("t");
  }
  /// What torch.save writes for a tensor.
  Pickle& tensor(const std::string& storage_type, const std::string& record, int64_t storage_numel,
                 int64_t offset, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
    global("torch._utils", "_rebuild_tensor_v2").raw("((");
    text("storage").global("torch", storage_type).text(record).text("cpu").integer(storage_numel).raw("tQ");
    integer(offset).tuple(shape).tuple(strides).raw("\x89");
    return global("collections", "OrderedDict").raw(")RtR");
  }
  std::string state_dict_of(const std::string& name) const {  // {name: what was emitted}
    return std::string("\x80\x02}", 3) + Pickle().text(name).bytes_.substr(2) + bytes_.substr(2) + "s.";
  }
  const std::string& bytes() const { return bytes_; }

 private:
  Pickle& little_endian(uint64_t value, int count) {
    for (int i = 0; i < count; ++i) bytes_.push_back(static_cast<char>(value >> 8 * i));
    return *this;
  }
  std::string bytes_;
};

std::map<std::string, PickledTensor> unpickle(const std::string& pickle) {
  return read_state_dict(std::as_bytes(std::span(pickle)), "file.bin");
}

const fs::path kGolden = fs::path(STBLLM_SOURCE_DIR) / "tests/golden/state_dict.bin";

/// `action` succeeds or throws Error; anything else fails the test.
void expect_success_or_error(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error&) {
  }
}

/// A pytorch_model.bin with one record "0" of four floats 0, 1, 2, 3.
void write_archive(const fs::path& path, const std::string& pickle, bool compress = false,
                   const std::string& byte_order = "little") {
  caffe2::serialize::PyTorchStreamWriter writer(path.string());
  const std::vector<float> values = {0, 1, 2, 3};
  writer.writeRecord("data.pkl", pickle.data(), pickle.size(), compress);
  writer.writeRecord("byteorder", byte_order.data(), byte_order.size());
  writer.writeRecord("data/0", values.data(), values.size() * sizeof(float), compress);
  writer.writeEndOfFile();
}

std::string four_floats() {
  return Pickle().tensor("FloatStorage", "0", 4, 0, {2, 2}, {2, 1}).state_dict_of("w");
}

// --- a file of torch.save ----------------------------------------------------------------------------------

/// The numbers 0, 1/4, 2/4, ... as tests/golden/make_state_dict.py wrote them.
at::Tensor ramp(at::IntArrayRef shape) {
  return (at::arange(c10::multiply_integers(shape), at::kFloat) / 4).reshape(shape);
}

TEST(TorchPickle, ReadsEveryTensorThatTorchSaved) {
  const auto source = open_torch_pickle(kGolden);
  const at::Tensor base = ramp({4, 6});
  const std::map<std::string, at::Tensor> expected = {
      {"embed.weight", ramp({5, 4})},
      {"head.weight", ramp({5, 4})},
      {"head.bias", ramp({5})},
      {"half", ramp({3, 2}).to(at::kHalf)},
      {"bfloat16", ramp({3, 2}).to(at::kBFloat16)},
      {"base", base},
      {"transposed", base.t()},
      {"rows", base.slice(0, 1, 3)},
      {"strided", base.slice(0, 1).slice(1, 0, 6, 2)},
      {"parameter", ramp({2})},
      {"empty", at::empty({0, 3})},
      {"scalar", at::scalar_tensor(0.25f)},
  };
  for (const auto& [name, tensor] : expected) {
    const at::Tensor loaded = source->load(name);
    EXPECT_EQ(source->shape(name), tensor.sizes().vec()) << name;
    EXPECT_EQ(loaded.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_TRUE(loaded.is_contiguous()) << name;
    EXPECT_TRUE(at::equal(loaded, tensor)) << name << '\n' << loaded << '\n' << tensor;
  }
  std::vector<std::string> names = {"steps"};  // of int64: listed, but no weight
  for (const auto& [name, tensor] : expected) names.push_back(name);
  EXPECT_THAT(source->names(), testing::UnorderedElementsAreArray(names));
  EXPECT_EQ(source->shape("steps"), std::vector<int64_t>{1});
  expect_error(ErrorCode::kUnsupported, "tensor steps has dtype Long", [&] { source->load("steps"); });
}

TEST(TorchPickle, LoadsViewsOfTheFile) {
  const auto source = open_torch_pickle(kGolden);
  EXPECT_EQ(source->load("base").data_ptr(), source->load("base").data_ptr());
  EXPECT_EQ(source->load("embed.weight").data_ptr(), source->load("head.weight").data_ptr()) << "tied";
  source->release("base");
  EXPECT_TRUE(at::equal(source->load("base"), ramp({4, 6}))) << "after its pages were released";
}

TEST(TorchPickle, TensorOutlivesItsSource) {
  const at::Tensor tensor = open_torch_pickle(kGolden)->load("base");
  EXPECT_TRUE(at::equal(tensor, ramp({4, 6})));
}

TEST(TorchPickle, ReadsCompressedRecords) {
  const ScratchDirectory directory;
  write_archive(directory / "model.bin", four_floats(), /*compress=*/true);
  const auto source = open_torch_pickle(directory / "model.bin");
  source->release("w");
  EXPECT_TRUE(at::equal(source->load("w"), at::arange(4, at::kFloat).reshape({2, 2})));
}

// --- files that are refused -------------------------------------------------------------------------------

TEST(TorchPickle, RefusesBigEndianStorages) {
  const ScratchDirectory directory;
  write_archive(directory / "model.bin", four_floats(), false, "big");
  expect_error(ErrorCode::kUnsupported, "byte order little, found big",
               [&] { open_torch_pickle(directory / "model.bin"); });
}

TEST(TorchPickle, RefusesTheOldFormatAndSaysHowToConvert) {
  const ScratchDirectory directory;
  write_all(directory / "model.bin", std::string("\x80\x02\x8a\x0al\xfc\x9c", 7));
  expect_error(ErrorCode::kUnsupported, "torch.save(torch.load(p",
               [&] { open_torch_pickle(directory / "model.bin"); });
}

TEST(TorchPickle, RefusesAFileWithoutTensorsAtTheTopLevel) {
  const ScratchDirectory directory;
  write_archive(directory / "model.bin", std::string("\x80\x02}X\x05\0\0\0model}s.", 16));
  expect_error(ErrorCode::kUnsupported, "a state_dict", [&] { open_torch_pickle(directory / "model.bin"); });
}

TEST(TorchPickle, RefusesAMissingOrShortStorage) {
  const ScratchDirectory directory;
  write_archive(directory / "a.bin", Pickle().tensor("FloatStorage", "1", 4, 0, {4}, {1}).state_dict_of("w"));
  expect_error(ErrorCode::kCorrupt, "tensor w is in record data/1, which is missing",
               [&] { open_torch_pickle(directory / "a.bin"); });
  write_archive(directory / "b.bin", Pickle().tensor("FloatStorage", "0", 5, 0, {5}, {1}).state_dict_of("w"));
  expect_error(ErrorCode::kCorrupt, "should hold 5 elements, it holds 4",
               [&] { open_torch_pickle(directory / "b.bin"); });
}

TEST(TorchPickle, FindsEveryTruncationWhenItOpens) {
  const ScratchDirectory directory;
  const fs::path path = directory / "cut.bin";
  fs::copy(kGolden, path);
  for (auto size = fs::file_size(path); size-- > 0;) {
    fs::resize_file(path, size);
    EXPECT_THROW(open_torch_pickle(path), Error) << size;
  }
}

TEST(TorchPickle, SurvivesEveryChangedByte) {
  const ScratchDirectory directory;
  const fs::path path = directory / "damaged.bin";
  fs::copy(kGolden, path);
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  const auto put = [&](int64_t at, char byte) { file.seekp(at).put(byte).flush(); };
  const std::string whole = read_all(kGolden);
  for (size_t i = 0; i < whole.size(); ++i) {
    put(i, ~whole[i]);
    expect_success_or_error([&] {
      const auto source = open_torch_pickle(path);
      for (const std::string& name : source->names())
        expect_success_or_error([&] { source->load(name).sum(); });
    });
    put(i, whole[i]);
  }
}

TEST(TorchPickle, RefusesATensorThatRepeatsItsElements) {
  // Strides of 0 make any number of elements out of one, which a copy would give memory to.
  const ScratchDirectory directory;
  write_archive(directory / "model.bin",
                Pickle().tensor("FloatStorage", "0", 4, 0, {1 << 30, 1 << 20}, {0, 0}).state_dict_of("w"));
  const auto source = open_torch_pickle(directory / "model.bin");
  expect_error(ErrorCode::kUnsupported, "tensor w repeats", [&] { source->load("w"); });
}

TEST(TorchPickle, RefusesRecordsThatClaimMoreThanDeflateCanHold) {
  const ScratchDirectory directory;
  const fs::path path = directory / "model.bin";
  write_archive(path, four_floats(), /*compress=*/true);
  const std::string whole = read_all(path);
  // libtorch's reader unpacks the last one, "version", as soon as it is made.
  int records = 0;
  for (size_t entry = 0; (entry = whole.find("PK\x01\x02", entry)) != std::string::npos; ++entry, ++records) {
    std::string bytes = whole;
    bytes.replace(entry + 24, 4, "\xf0\xff\xff\x7f");  // the size before compression
    write_all(path, bytes);
    expect_error(ErrorCode::kCorrupt, "its records claim to hold 21474", [&] { open_torch_pickle(path); });
  }
  EXPECT_GE(records, 4);
}

TEST(TorchPickle, RefusesASizeOf64BitsThatDeflateCannotHold) {
  const ScratchDirectory directory;
  const fs::path path = directory / "pytorch_model.bin";  // whose name its records begin with
  write_archive(path, four_floats());
  std::string bytes = read_all(path);
  // The first entry gets the field of 64-bit sizes in place of its name's last 12 bytes, after a field of
  // none.
  const size_t entry = bytes.find("PK\x01\x02");
  const size_t name = static_cast<unsigned char>(bytes[entry + 28]);
  ASSERT_GE(name, 16u);
  bytes.replace(entry + 24, 4, "\xff\xff\xff\xff");
  bytes[entry + 28] = static_cast<char>(name - 16);
  bytes[entry + 30] = 16;
  bytes.replace(entry + 46 + name - 16, 16, std::string("\x07\0\0\0\x01\0\x08\0\0\0\0\0\0\x10\0\0", 16));
  write_all(path, bytes);
  expect_error(ErrorCode::kCorrupt, "its records claim to hold 17592186", [&] { open_torch_pickle(path); });
}

// --- the unpickler ---------------------------------------------------------------------------------------

TEST(Pickle, RefusesEveryGlobalThatIsNotListed) {
  const std::string pickle = Pickle().global("os", "system").text("echo").raw("\x85R").state_dict_of("w");
  expect_error(ErrorCode::kUnsupported, "\"os.system\"", [&] { unpickle(pickle); });
}

TEST(Pickle, RefusesOperationsThatATensorDoesNotNeed) {
  // GLOBAL's sibling INST, NEWOBJ and STACK_GLOBAL make objects by other ways.
  for (const char* operation : {"i", "\x81", "\x93", "o"}) {
    expect_error(ErrorCode::kUnsupported, "operation 0x",
                 [&] { unpickle(Pickle().raw(operation).raw(".").bytes()); });
  }
}

TEST(Pickle, RefusesAnotherProtocol) {
  expect_error(ErrorCode::kUnsupported, "protocol 4", [&] { unpickle("\x80\x04}."); });
}

TEST(Pickle, RefusesTensorsThatReachOutOfTheirStorage) {
  constexpr int64_t kHuge = int64_t{1} << 62;
  const auto open = [](int64_t numel, int64_t offset, std::vector<int64_t> shape,
                       std::vector<int64_t> strides) {
    unpickle(Pickle().tensor("FloatStorage", "0", numel, offset, shape, strides).state_dict_of("w"));
  };
  EXPECT_NO_THROW(open(6, 0, {2, 3}, {3, 1}));
  EXPECT_NO_THROW(open(6, 2, {2, 2}, {2, 1}));
  EXPECT_NO_THROW(open(6, 6, {0, 3}, {3, 1}));
  EXPECT_THROW(open(6, 1, {2, 3}, {3, 1}), Error);
  EXPECT_THROW(open(6, -1, {2, 3}, {3, 1}), Error);
  EXPECT_THROW(open(6, 7, {0, 3}, {3, 1}), Error);
  EXPECT_THROW(open(6, 0, {2, 3}, {4, 1}), Error);
  EXPECT_THROW(open(6, 5, {2}, {-1}), Error);
  EXPECT_THROW(open(6, 0, {-2}, {1}), Error);
  EXPECT_THROW(open(6, 0, {2, 3}, {3}), Error);
  EXPECT_THROW(open(6, 0, {kHuge, kHuge}, {0, 0}), Error);
  EXPECT_THROW(open(6, 0, {3, 3}, {kHuge, kHuge}), Error);
  EXPECT_THROW(open(-1, 0, {1}, {1}), Error);
}

TEST(Pickle, RefusesOneNameForTwoTensors) {
  const std::string one = Pickle().tensor("FloatStorage", "0", 4, 0, {4}, {1}).state_dict_of("w");
  const std::string item = one.substr(3, one.size() - 4);  // without what opens and ends the dictionary
  expect_error(ErrorCode::kCorrupt, "tensor w is there twice",
               [&] { unpickle(std::string("\x80\x02}", 3) + item + item + "."); });
}

TEST(Pickle, RefusesWhatNoTensorHas) {
  const auto refuse = [](const std::string& part, const std::string& record, std::vector<int64_t> shape) {
    const std::string pickle = Pickle().tensor("FloatStorage", record, 4, 0, shape, shape).state_dict_of("w");
    expect_error(ErrorCode::kCorrupt, part, [&] { unpickle(pickle); });
  };
  refuse("more than 64 dimensions", "0", std::vector<int64_t>(65, 1));
  refuse("key of a storage is too long", std::string(256, '0'), {1});
  refuse("impossible shape", "0", {std::numeric_limits<int64_t>::min()});
}

TEST(Pickle, SurvivesEveryTruncationAndEveryChangedByte) {
  const std::string whole = four_floats();
  ASSERT_EQ(unpickle(whole).size(), 1u);
  for (size_t size = 0; size < whole.size(); ++size) {
    EXPECT_THROW(unpickle(whole.substr(0, size)), Error) << size;
  }
  for (size_t i = 0; i < whole.size(); ++i) {
    for (int value = 0; value < 256; ++value) {
      std::string damaged = whole;
      damaged[i] = static_cast<char>(value);
      expect_success_or_error([&] { unpickle(damaged); });
    }
  }
}

TEST(Pickle, SurvivesMisuseOfStackAndMemo) {
  for (const char* operations : {"h\x01.", "q\x01.", "(q\x01.", "t.", "u.", "R.", ")R.", "]s.", "}K\x01s.",
                                 "(K\x01u.", "b.", "Q.", "."}) {
    EXPECT_THROW(unpickle(Pickle().raw(operations).bytes()), Error) << operations;
  }
  // A list and a dictionary that hold themselves.
  EXPECT_THROW(unpickle(Pickle()
                            .raw("]q\x01h\x01"
                                 "a.")
                            .bytes()),
               Error);
  EXPECT_TRUE(unpickle(Pickle().raw("}q\x01K\x01h\x01s.").bytes()).empty());
}

TEST(Pickle, SurvivesDeepNesting) {
  const std::string deep = Pickle().raw(")").raw(std::string(1'000'000, '\x85')).state_dict_of("w");
  EXPECT_TRUE(unpickle(deep).empty());
}

}  // namespace
}  // namespace stbllm
