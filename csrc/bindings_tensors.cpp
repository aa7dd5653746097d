#include "bindings_tensors.h"

#include <cstddef>
#include <mutex>
#include <new>

namespace jlebm {
namespace {

struct DlExchange {
    struct {
        uint32_t major, minor;
        void* older;
    } header;
    void *allocate, *managed_from_object;
    int (*object_from_managed)(void* managed, void** made);   // 0, or -1 with a Python exception set
    int (*tensor_from_object)(void* object, DlTensor* found); // 0, or -1 with a Python exception set
};

// Set once by read_tensors_through, under the interpreter's lock.
const DlExchange* exchange = nullptr;
PyTypeObject *tensor_class = nullptr, *parameter_class = nullptr;
PyObject* is_neg = nullptr; // the method
int32_t widest_layer = 0;

// whether a tensor's memory holds its values' negatives (the imaginary part of a conjugate), of which DLPack's table
// says nothing
bool is_negative(py::handle tensor) {
    PyObject* const arguments[] = {tensor.ptr()};
    const py::object answer = py::reinterpret_steal<py::object>(PyObject_Vectorcall(is_neg, arguments, 1, nullptr));
    if (!answer) throw py::error_already_set();
    return answer.ptr() != Py_False;
}

} // namespace

bool read_tensors_through(py::handle capsule, py::handle tensor, py::handle parameter, int32_t widest) {
    const auto* found = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
    if (found->header.major != 1 || found->tensor_from_object == nullptr || found->object_from_managed == nullptr)
        return false;
    is_neg = py::object(tensor.attr("is_neg")).release().ptr();
    exchange = found;
    widest_layer = widest;
    tensor_class = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    parameter_class = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
    return true;
}

bool can_read_tensors() { return exchange != nullptr; }

constexpr std::align_val_t kTensorAlign{64}; // torch's own

// Memory of tensors that are gone, for the next of the same size: what a call tells of ten thousand chains fills some
// 1,800 pages, and being given fresh ones each time costs more than to compute it.
class Kept {
public:
    void* take(size_t bytes) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock); // a fork may have left it locked
        if (lock) {
            for (size_t i = blocks_.size(); i-- > 0;) {
                if (blocks_[i].bytes != bytes) continue;
                void* const memory = blocks_[i].memory;
                blocks_.erase(blocks_.begin() + std::ptrdiff_t(i));
                held_ -= bytes;
                return memory;
            }
        }
        return ::operator new(bytes, kTensorAlign);
    }

    void give(void* memory, size_t bytes) {
        const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock || bytes < kLeast || bytes > kMost) return ::operator delete(memory, kTensorAlign);
        while (held_ + bytes > kMost || blocks_.size() == blocks_.capacity()) { // the oldest go
            ::operator delete(blocks_.front().memory, kTensorAlign);
            held_ -= blocks_.front().bytes;
            blocks_.erase(blocks_.begin());
        }
        blocks_.push_back({memory, bytes});
        held_ += bytes;
    }

private:
    static constexpr size_t kLeast = size_t(1) << 16, kMost = size_t(1) << 25; // each, all of them
    struct Block {
        void* memory;
        size_t bytes;
    };

    std::vector<Block> blocks_ = [] {
        std::vector<Block> none;
        none.reserve(32);
        return none;
    }();
    std::mutex mutex_;
    size_t held_ = 0;
};

// never destroyed: tensors may be the last to go
Kept& kept() {
    static Kept& kept = *new Kept;
    return kept;
}

void NewTensor::disown(Managed* memory) {
    if (memory->owners.fetch_sub(1) > 1) return;
    const size_t bytes = memory->bytes;
    memory->~Managed();
    kept().give(memory, bytes);
}

NewTensor::NewTensor(DlType type, int32_t n_dims, int64_t rows, int64_t n) : memory_(nullptr, &disown) {
    constexpr size_t align = size_t(kTensorAlign), head = (sizeof(Managed) + align - 1) / align * align;
    const size_t bytes = head + size_t(rows * n) * type.bits / 8;
    char* const memory = static_cast<char*>(kept().take(bytes));
    memory_.reset(new (memory)
                      Managed{1, 0, nullptr, &disown, 0, {}, {rows, n}, {std::max<int64_t>(n, 1), 1}, {1}, bytes});
    const int skipped = 2 - n_dims;
    memory_->tensor = {
        memory + head, {kDlCpu, 0}, n_dims, type, memory_->shape + skipped, memory_->strides + skipped, 0};
}

py::object NewTensor::made() {
    memory_->owners.fetch_add(1); // the tensor; where torch fails, whether it has given the memory up is not known
    void* made = nullptr;
    if (exchange->object_from_managed(memory_.get(), &made) != 0) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(static_cast<PyObject*>(made));
}

bool is_tensor_class(py::handle cls) { return cls.ptr() == reinterpret_cast<PyObject*>(tensor_class); }

bool tensor_of(py::handle object, DlType type, DlTensor& t) {
    if (Py_TYPE(object.ptr()) != tensor_class && Py_TYPE(object.ptr()) != parameter_class) return false;
    if (exchange->tensor_from_object(object.ptr(), &t) != 0) { // sparse, nested, …
        PyErr_Clear();
        return false;
    }
    if (t.device.type != kDlCpu || t.type.code != type.code || t.type.bits != type.bits || t.type.lanes != type.lanes)
        return false;
    int64_t items = 1;
    bool packed = true;
    for (int d = t.n_dims - 1; d >= 0; --d) {
        packed = packed && (t.shape[d] == 1 || t.strides[d] == items);
        items *= t.shape[d];
    }
    if (is_negative(object)) return false;
    t.data = static_cast<char*>(t.data) + t.byte_offset;
    // without memory: the zeros that autograd writes down without making them
    return items == 0 || (packed && t.data != nullptr);
}

bool has_shape(const DlTensor& t, std::initializer_list<int64_t> shape) {
    return t.n_dims == int32_t(shape.size()) && std::equal(shape.begin(), shape.end(), t.shape);
}

bool integer_of(py::handle object, int64_t most, int64_t& value) {
    if (!PyLong_CheckExact(object.ptr())) return false;
    int overflow = 0;
    value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    return overflow == 0 && value >= 0 && value <= most;
}

bool counter_of(py::handle object, uint32_t& counter) {
    int64_t value;
    if (!integer_of(object, std::numeric_limits<uint32_t>::max(), value)) return false;
    counter = uint32_t(value);
    return true;
}

bool key_of(py::handle object, uint64_t& key) {
    if (PyLong_CheckExact(object.ptr())) {
        key = PyLong_AsUnsignedLongLong(object.ptr());
        if (key != ~0ull || !PyErr_Occurred()) return true;
        PyErr_Clear();
        return false;
    }
    DlTensor t;
    if (!tensor_of(object, kInt64, t)) return false;
    for (int d = 0; d < t.n_dims; ++d)
        if (t.shape[d] != 1) return false;
    key = *static_cast<const uint64_t*>(t.data);
    return true;
}

bool z_of(py::handle object, int64_t& chains, int64_t& dim, const float*& data) {
    DlTensor t;
    if (!tensor_of(object, kFloat32, t) || t.n_dims != 2) return false;
    chains = t.shape[0], dim = t.shape[1], data = static_cast<const float*>(t.data);
    return true;
}

bool mlp_of(py::handle record, int64_t chains, int64_t dim, MlpParams& p) {
    Fields fields(record);
    if (fields.size() != 5) return false;
    const py::handle spec = fields.next();
    return mlp_of(spec, fields, chains, dim, p);
}

bool mlp_of(py::handle spec, Fields& rest, int64_t chains, int64_t dim, MlpParams& p) {
    static PyObject* const native_fields = PyUnicode_InternFromString("native_fields");
    const py::object constants = py::reinterpret_steal<py::object>(PyObject_GetAttr(spec.ptr(), native_fields));
    if (!constants) throw py::error_already_set();
    Fields numbers(constants);
    mlp_constants(numbers, p);
    Fields weights(rest.next()), biases(rest.next());
    const size_t n_layers = size_t(p.n_hidden) + 1;
    if (p.dim() != dim || *std::max_element(p.widths, p.widths + n_layers + 1) > widest_layer ||
        weights.size() != n_layers || biases.size() != n_layers)
        return false;
    for (size_t l = 0; l < n_layers; ++l)
        if (!array_of(weights.next(), kFloat32, {p.widths[l + 1], p.widths[l]}, p.weights[l]) ||
            !array_or_none(biases.next(), kFloat32, {p.widths[l + 1]}, p.biases[l]))
            return false;
    return array_or_none(rest.next(), kFloat32, {chains, p.widths[1]}, p.context_bias) &&
           array_or_none(rest.next(), kInt64, {chains}, p.logit) && (p.logit != nullptr) == (p.head == Head::kLogit);
}

bool update_of(py::handle record, int64_t chains, int64_t dim, int64_t n_steps, UpdateParams& p) {
    Fields fields(record);
    return fields.size() == 10 && update_of(fields, chains, dim, n_steps, p);
}

bool update_of(Fields& fields, int64_t chains, int64_t dim, int64_t n_steps, UpdateParams& p) {
    return array_of(fields.next(), kFloat32, {n_steps, 3}, p.step_coefficients) &&
           array_or_none(fields.next(), kFloat32, {chains, 3}, p.chain_coefficients) &&
           rows_or_none(fields.next(), kFloat32, chains, dim, p.prior_mean, p.prior_mean_stride) &&
           rows_or_none(fields.next(), kFloat32, chains, dim, p.prior_precision, p.prior_precision_stride) &&
           rows_or_none(fields.next(), kBool, chains, dim, p.frozen, p.frozen_stride) &&
           array_or_none(fields.next(), kFloat32, {n_steps, chains, dim}, p.noise) &&
           key_of(fields.next(), p.noise_key) && counter_of(fields.next(), p.first_step) &&
           counter_of(fields.next(), p.first_chain) &&
           array_or_none(fields.next(), kFloat32, {chains, dim}, p.extra_grad);
}

bool result_of(py::handle record, py::handle thin, MlpLangevinChainParams& p, int64_t dim, Layers& end) {
    Fields fields(record);
    if (fields.size() != 6 || !end.read(fields.next()) ||
        !integer_of(thin, std::numeric_limits<int64_t>::max(), p.record.thin) || p.record.thin == 0)
        return false;
    const int64_t kept = p.n_steps / p.record.thin;
    return array_or_none(fields.next(), kFloat32, {kept, p.chains}, p.record.energy) &&
           array_or_none(fields.next(), kFloat32, {kept, p.chains}, p.record.grad_norm) &&
           array_or_none(fields.next(), kFloat32, {kept, p.chains}, p.record.displacement) &&
           array_or_none(fields.next(), kInt64, {p.chains}, p.record.first_bad_step) &&
           array_or_none(fields.next(), kFloat32, {kept, p.chains, dim}, p.record.trajectory);
}

} // namespace jlebm
