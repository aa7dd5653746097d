// Plain calls on the CPU, from Python's tensors to the kernel in one go.
//
// A call is plain if its tensors are torch.Tensor or Parameter, on the CPU, contiguous, of the shapes that fit and in
// float32 (a chosen logit and a key int64, a mask bool), and its numbers are ints in range. Any other call is answered
// with False, before anything is written: the checks of ops.py then say what is wrong, or the backend prepares it.
// Python needs about a microsecond for the checks of one tensor; here all of them take less.
//
// Tensors are read through DLPack's table of C functions (https://dmlc.github.io/dlpack/latest/c_api.html), which torch
// 2.10 and newer carry on their class: no header of torch is needed, and one build serves every torch.
#include <algorithm>
#include <initializer_list>
#include <vector>

#include "bindings_records.h"
#include "cpu/kernels.h"

namespace jlebm {
namespace {

// --- DLPack 1, as far as it is read here

struct DlDevice {
    int32_t type, index;
};
constexpr int32_t kDlCpu = 1;

struct DlType {
    uint8_t code, bits;
    uint16_t lanes;
};
constexpr DlType kInt64{0, 64, 1}, kFloat32{2, 32, 1}, kBool{6, 8, 1};

struct DlTensor {
    void* data;
    DlDevice device;
    int32_t n_dims;
    DlType type;
    int64_t *shape, *strides; // of the tensor itself, nothing to free
    uint64_t byte_offset;
};

struct DlExchange {
    struct {
        uint32_t major, minor;
        void* older;
    } header;
    void *allocate, *managed_from_object, *managed_to_object;
    int (*tensor_from_object)(void* object, DlTensor* found); // 0, or -1 with a Python exception set
};

// Set once by read_tensors_through, under the interpreter's lock.
const DlExchange* exchange = nullptr;
PyTypeObject *tensor_class = nullptr, *parameter_class = nullptr;
int32_t widest_layer = 0;

bool read_tensors_through(py::handle capsule, py::handle tensor, py::handle parameter, int32_t widest) {
    const auto* found = static_cast<const DlExchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
    if (found->header.major != 1 || found->tensor_from_object == nullptr) return false;
    exchange = found;
    widest_layer = widest;
    tensor_class = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
    parameter_class = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
    return true;
}

// --- one argument at a time: false where it is not plain

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
    t.data = static_cast<char*>(t.data) + t.byte_offset;
    // without memory: the zeros that autograd writes down without making them
    return items == 0 || (packed && t.data != nullptr);
}

bool has_shape(const DlTensor& t, std::initializer_list<int64_t> shape) {
    return t.n_dims == int32_t(shape.size()) && std::equal(shape.begin(), shape.end(), t.shape);
}

template <class T>
bool array_of(py::handle object, DlType type, std::initializer_list<int64_t> shape, T*& data) {
    DlTensor t;
    if (!tensor_of(object, type, t) || !has_shape(t, shape)) return false;
    data = static_cast<T*>(t.data);
    return true;
}

template <class T>
bool array_or_none(py::handle object, DlType type, std::initializer_list<int64_t> shape, T*& data) {
    return object.is_none() || array_of(object, type, shape, data);
}

// [dim] for all chains or [chains, dim]
template <class T>
bool rows_or_none(py::handle object, DlType type, int64_t chains, int64_t dim, T*& data, int64_t& stride) {
    if (object.is_none()) return true;
    DlTensor t;
    if (!tensor_of(object, type, t)) return false;
    stride = t.n_dims == 2 ? dim : 0;
    data = static_cast<T*>(t.data);
    return has_shape(t, {dim}) || has_shape(t, {chains, dim});
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

// --- the records of problem.py

// Latents as users hold them: one tensor, or layers that lie side by side in the kernels' [chains, dim]; each is
// [chains, d_l] or [chains, d_l, 1, 1]. Several are copied into one array and back, which costs a small call less than
// torch.cat and torch.split.
constexpr size_t kMostLayers = 64;

struct Layers {
    size_t count = 0;
    int64_t chains = 0, dim = 0;
    float* rows[kMostLayers];
    int64_t widths[kMostLayers];
    int32_t n_dims[kMostLayers];

    bool read(py::handle latents) {
        if (!PyList_Check(latents.ptr()) && !PyTuple_Check(latents.ptr())) return add(latents);
        Fields layers(latents);
        if (layers.size() == 0 || layers.size() > kMostLayers) return false;
        for (size_t left = layers.size(); left > 0; --left)
            if (!add(layers.next())) return false;
        return true;
    }

    bool same_shapes(const Layers& other) const {
        return count == other.count && chains == other.chains && std::equal(widths, widths + count, other.widths);
    }

    // [chains, dim]: the only layer where it stands, several copied into `flat`
    const float* side_by_side(std::vector<float>& flat) const {
        if (count == 1) return rows[0];
        flat.resize(size_t(chains * dim));
        each_row([](float* row, float* in_flat, int64_t n) { std::copy_n(row, n, in_flat); }, flat.data());
        return flat.data();
    }

    // the layers from [chains, dim]
    void take(float* flat) const {
        each_row([](float* row, float* in_flat, int64_t n) { std::copy_n(in_flat, n, row); }, flat);
    }

private:
    bool add(py::handle layer) {
        DlTensor t;
        if (!tensor_of(layer, kFloat32, t) || (t.n_dims != 2 && t.n_dims != 4)) return false;
        if (t.n_dims == 4 && (t.shape[2] != 1 || t.shape[3] != 1)) return false;
        if (count > 0 && t.shape[0] != chains) return false;
        chains = t.shape[0], dim += t.shape[1];
        rows[count] = static_cast<float*>(t.data), widths[count] = t.shape[1], n_dims[count] = t.n_dims;
        ++count;
        return true;
    }

    template <class Copy>
    void each_row(const Copy copy, float* flat) const {
        for (size_t l = 0; l < count; flat += widths[l], ++l)
            for (int64_t c = 0; c < chains; ++c) copy(rows[l] + c * widths[l], flat + c * dim, widths[l]);
    }
};

bool z_of(py::handle object, int64_t& chains, int64_t& dim, const float*& data) {
    DlTensor t;
    if (!tensor_of(object, kFloat32, t) || t.n_dims != 2) return false;
    chains = t.shape[0], dim = t.shape[1], data = static_cast<const float*>(t.data);
    return true;
}

bool mlp_of(py::handle record, int64_t chains, int64_t dim, MlpParams& p) {
    static PyObject* const native_fields = PyUnicode_InternFromString("native_fields");
    Fields fields(record);
    if (fields.size() != 5) return false;
    const py::object constants =
        py::reinterpret_steal<py::object>(PyObject_GetAttr(fields.next().ptr(), native_fields));
    if (!constants) throw py::error_already_set();
    Fields numbers(constants);
    mlp_constants(numbers, p);
    Fields weights(fields.next()), biases(fields.next());
    const size_t n_layers = size_t(p.n_hidden) + 1;
    if (p.dim() != dim || *std::max_element(p.widths, p.widths + n_layers + 1) > widest_layer ||
        weights.size() != n_layers || biases.size() != n_layers)
        return false;
    for (size_t l = 0; l < n_layers; ++l)
        if (!array_of(weights.next(), kFloat32, {p.widths[l + 1], p.widths[l]}, p.weights[l]) ||
            !array_or_none(biases.next(), kFloat32, {p.widths[l + 1]}, p.biases[l]))
            return false;
    return array_or_none(fields.next(), kFloat32, {chains, p.widths[1]}, p.context_bias) &&
           array_or_none(fields.next(), kInt64, {chains}, p.logit) && (p.logit != nullptr) == (p.head == Head::kLogit);
}

bool update_of(py::handle record, int64_t chains, int64_t dim, int64_t n_steps, UpdateParams& p) {
    Fields fields(record);
    return fields.size() == 10 && array_of(fields.next(), kFloat32, {n_steps, 3}, p.step_coefficients) &&
           array_or_none(fields.next(), kFloat32, {chains, 3}, p.chain_coefficients) &&
           rows_or_none(fields.next(), kFloat32, chains, dim, p.prior_mean, p.prior_mean_stride) &&
           rows_or_none(fields.next(), kFloat32, chains, dim, p.prior_precision, p.prior_precision_stride) &&
           rows_or_none(fields.next(), kBool, chains, dim, p.frozen, p.frozen_stride) &&
           array_or_none(fields.next(), kFloat32, {n_steps, chains, dim}, p.noise) &&
           key_of(fields.next(), p.noise_key) && counter_of(fields.next(), p.first_step) &&
           counter_of(fields.next(), p.first_chain) &&
           array_or_none(fields.next(), kFloat32, {chains, dim}, p.extra_grad);
}

// ChainResult, to be written; its end may be layers
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

// layout, of latents.py, whose container is torch.Tensor, list or tuple: whether z lies so, in plain tensors that hold
// their values and not their negatives (a conjugate's imag), layers of no more than `most` floats in all
bool latents(py::handle z, py::handle layout, int64_t most) {
    static PyObject* const is_neg = PyUnicode_InternFromString("is_neg");
    Fields fields(layout);
    const py::handle container = fields.next();
    const bool one = container.ptr() == reinterpret_cast<PyObject*>(tensor_class);
    if (!one && reinterpret_cast<PyObject*>(Py_TYPE(z.ptr())) != container.ptr()) return false;
    Layers found;
    if (!found.read(z) || (!one && found.chains * found.dim > most)) return false;
    Fields dims(fields.next()), trailing(fields.next());
    if (dims.size() != found.count) return false;
    PyObject* alone = z.ptr();
    Fields layers = one ? Fields(&alone, 1) : Fields(z);
    for (size_t l = 0; l < found.count; ++l) {
        if (dims.integer() != found.widths[l] || 2 + Fields(trailing.next()).size() != size_t(found.n_dims[l]))
            return false;
        const py::object negative =
            py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(layers.next().ptr(), is_neg));
        if (!negative) throw py::error_already_set();
        if (negative.ptr() != Py_False) return false;
    }
    return true;
}

// --- the operations

bool langevin_noise(py::handle noise_key, py::handle first_step, py::handle first_chain, py::handle stream,
                    py::handle out, int n_threads) {
    LangevinNoiseParams p;
    DlTensor t;
    if (!key_of(noise_key, p.noise_key) || !counter_of(first_step, p.first_step) ||
        !counter_of(first_chain, p.first_chain) || !counter_of(stream, p.stream) || !tensor_of(out, kFloat32, t) ||
        t.n_dims != 3)
        return false;
    p.n_steps = t.shape[0], p.chains = t.shape[1], p.dim = t.shape[2], p.out = static_cast<float*>(t.data);
    if (p.n_steps * p.chains * p.dim == 0) return true;
    const py::gil_scoped_release unlocked;
    cpu_kernels().langevin_noise(p, n_threads);
    return true;
}

bool langevin_step(py::handle z, py::handle grad, py::handle update, py::handle out, int n_threads) {
    LangevinStepParams p;
    if (!z_of(z, p.chains, p.dim, p.z) || !array_of(grad, kFloat32, {p.chains, p.dim}, p.grad) ||
        !update_of(update, p.chains, p.dim, 1, p.update) || !array_of(out, kFloat32, {p.chains, p.dim}, p.out))
        return false;
    if (p.chains * p.dim == 0) return true;
    const py::gil_scoped_release unlocked;
    cpu_kernels().langevin_step(p, n_threads);
    return true;
}

bool mlp_energy_grad(py::handle z, py::handle mlp, py::handle energy, py::handle grad, int n_threads) {
    MlpEnergyGradParams p;
    int64_t dim;
    if (!z_of(z, p.chains, dim, p.z) || !mlp_of(mlp, p.chains, dim, p.mlp) ||
        !array_of(energy, kFloat32, {p.chains}, p.energy) || !array_of(grad, kFloat32, {p.chains, dim}, p.grad))
        return false;
    if (p.chains == 0) return true;
    const py::gil_scoped_release unlocked;
    cpu_kernels().mlp_energy_grad(p, n_threads);
    return true;
}

bool mlp_energy_layers(py::handle z, py::handle mlp, py::handle energy, py::handle hidden, py::handle delta,
                       py::handle grad, int n_threads) {
    MlpEnergyLayersParams p;
    int64_t dim, units = 0;
    if (!z_of(z, p.chains, dim, p.z) || !mlp_of(mlp, p.chains, dim, p.mlp)) return false;
    for (int l = 1; l <= p.mlp.n_hidden; ++l) units += p.mlp.widths[l];
    if (!array_of(energy, kFloat32, {p.chains}, p.energy) ||
        !array_or_none(hidden, kFloat32, {units, p.chains}, p.hidden) ||
        !array_or_none(delta, kFloat32, {units + p.mlp.n_logits(), p.chains}, p.delta) ||
        !array_or_none(grad, kFloat32, {p.chains, dim}, p.grad))
        return false;
    if (p.chains == 0) return true;
    const py::gil_scoped_release unlocked;
    cpu_kernels().mlp_energy_layers(p, n_threads);
    return true;
}

// grads: as many entries as layers, each a tensor to be written or None
bool grads_of(py::handle grads, const MlpParams& mlp, bool of_weights, float** to) {
    Fields fields(grads);
    if (fields.size() != size_t(mlp.n_hidden) + 1) return false;
    for (int l = 0; l <= mlp.n_hidden; ++l) {
        const int64_t n_in = mlp.widths[l], n_out = mlp.widths[l + 1];
        if (of_weights ? !array_or_none(fields.next(), kFloat32, {n_out, n_in}, to[l])
                       : !array_or_none(fields.next(), kFloat32, {n_out}, to[l]))
            return false;
    }
    return true;
}

bool mlp_weight_grads(py::handle z, py::handle mlp, py::handle hidden, py::handle delta, py::handle cotangent,
                      py::handle weight_grads, py::handle bias_grads, int n_threads) {
    MlpWeightGradsParams p;
    int64_t dim, units = 0;
    if (!z_of(z, p.chains, dim, p.z) || !mlp_of(mlp, p.chains, dim, p.mlp)) return false;
    for (int l = 1; l <= p.mlp.n_hidden; ++l) units += p.mlp.widths[l];
    if (!array_of(hidden, kFloat32, {units, p.chains}, p.hidden) ||
        !array_of(delta, kFloat32, {units + p.mlp.n_logits(), p.chains}, p.delta) ||
        !array_of(cotangent, kFloat32, {p.chains}, p.cotangent) ||
        !grads_of(weight_grads, p.mlp, true, p.weight_grads) || !grads_of(bias_grads, p.mlp, false, p.bias_grads))
        return false;
    const py::gil_scoped_release unlocked;
    cpu_kernels().mlp_weight_grads(p, n_threads);
    return true;
}

bool mlp_langevin_chain(py::handle z, py::handle mlp, py::handle update, py::handle n_steps, py::handle thin,
                        py::handle result, int n_threads) {
    MlpLangevinChainParams p;
    Layers begin, end;
    if (!integer_of(n_steps, std::numeric_limits<int64_t>::max(), p.n_steps) || !begin.read(z)) return false;
    const int64_t dim = begin.dim;
    p.chains = begin.chains;
    if (!mlp_of(mlp, p.chains, dim, p.mlp) || !update_of(update, p.chains, dim, p.n_steps, p.update) ||
        !result_of(result, thin, p, dim, end) || !end.same_shapes(begin))
        return false;
    if (p.chains == 0) return true;
    const py::gil_scoped_release unlocked;
    std::vector<float> start, finish;
    p.z = begin.side_by_side(start);
    if (end.count == 1) {
        p.out = end.rows[0];
    } else {
        finish.resize(size_t(p.chains * dim));
        p.out = finish.data();
    }
    cpu_kernels().mlp_langevin_chain(p, n_threads);
    if (end.count > 1) end.take(finish.data());
    return true;
}

// What a record's own reader throws (an unknown activation, say) is for the checks of ops.py to put in words.
template <auto operation, class... Arguments>
bool plain(Arguments... arguments) {
    if (exchange == nullptr) return false;
    try {
        return operation(arguments...);
    } catch (const py::builtin_exception&) {
        return false;
    } catch (const py::error_already_set&) {
        return false;
    } catch (const std::invalid_argument&) {
        return false;
    }
}

} // namespace

std::optional<bool> tensor_has_shape(PyObject* tensor, PyObject* shape) {
    if (exchange == nullptr) return std::nullopt;
    DlTensor t;
    if (exchange->tensor_from_object(tensor, &t) != 0) { // on no device, sparse, …
        PyErr_Clear();
        return std::nullopt;
    }
    Fields sizes(shape);
    if (size_t(t.n_dims) != sizes.size()) return false;
    for (int d = 0; d < t.n_dims; ++d)
        if (t.shape[d] != sizes.integer()) return false;
    return true;
}

void bind_plain(py::module_& m) {
    m.def("read_tensors_through", &read_tensors_through, py::arg("capsule"), py::arg("tensor"), py::arg("parameter"),
          py::arg("widest"),
          "give the plain calls DLPack's table, torch's classes and the widest layer; whether they know the table");
    m.def("plain_latents", &plain<latents, py::handle, py::handle, int64_t>);
    m.def("plain_langevin_noise",
          &plain<langevin_noise, py::handle, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_langevin_step", &plain<langevin_step, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_mlp_energy_grad", &plain<mlp_energy_grad, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_mlp_energy_layers",
          &plain<mlp_energy_layers, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_mlp_weight_grads", &plain<mlp_weight_grads, py::handle, py::handle, py::handle, py::handle, py::handle,
                                           py::handle, py::handle, int>);
    m.def("plain_mlp_langevin_chain",
          &plain<mlp_langevin_chain, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, int>);
}

} // namespace jlebm
