// Python's tensors and the records of problem.py, read for the plain calls of bindings_plain.cpp: false where something
// is not plain.
//
// Tensors are read and made through DLPack's table of C functions (https://dmlc.github.io/dlpack/latest/c_api.html),
// which torch 2.10 and newer carry on their class: no header of torch is needed, and one build serves every torch.
#pragma once

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <vector>

#include "bindings_records.h"

namespace jlebm {

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

// Torch's table, its classes, and the widest layer of a plain call; whether the table is one that we know. Under the
// interpreter's lock, once.
bool read_tensors_through(py::handle capsule, py::handle tensor, py::handle parameter, int32_t widest);

// whether there is such a table
bool can_read_tensors();

// A tensor of torch's to be: its memory can be written before, and while, torch makes the tensor of it, and until both
// are gone.
class NewTensor {
public:
    NewTensor(DlType type, int64_t n) : NewTensor(type, 1, 1, n) {}                  // [n]
    NewTensor(DlType type, int64_t rows, int64_t n) : NewTensor(type, 2, rows, n) {} // [rows, n]
    template <class T>
    T* data() const {
        return static_cast<T*>(memory_->tensor.data);
    }
    py::object made(); // once

private:
    struct Managed { // DLPack's DLManagedTensorVersioned, and what its tensor points to
        uint32_t major, minor;
        void* context;
        void (*disown)(Managed*);
        uint64_t flags;
        DlTensor tensor;
        int64_t shape[2], strides[2];
        std::atomic<int> owners;
        size_t bytes; // of all
    };
    static void disown(Managed* memory);

    NewTensor(DlType type, int32_t n_dims, int64_t rows, int64_t n);
    std::unique_ptr<Managed, void (*)(Managed*)> memory_;
};

// whether this is torch's class of tensors
bool is_tensor_class(py::handle cls);

// --- one argument at a time

bool tensor_of(py::handle object, DlType type, DlTensor& t);
bool has_shape(const DlTensor& t, std::initializer_list<int64_t> shape);

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

bool integer_of(py::handle object, int64_t most, int64_t& value);
bool counter_of(py::handle object, uint32_t& counter);
bool key_of(py::handle object, uint64_t& key);

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

bool z_of(py::handle object, int64_t& chains, int64_t& dim, const float*& data);
bool mlp_of(py::handle record, int64_t chains, int64_t dim, MlpParams& p);
// the same spread out: an MLPSpec, and weights, biases, context_bias and logit as the next four fields
bool mlp_of(py::handle spec, Fields& rest, int64_t chains, int64_t dim, MlpParams& p);
bool update_of(py::handle record, int64_t chains, int64_t dim, int64_t n_steps, UpdateParams& p);
// the same as the next ten fields
bool update_of(Fields& fields, int64_t chains, int64_t dim, int64_t n_steps, UpdateParams& p);
// ChainResult, to be written; its end may be layers
bool result_of(py::handle record, py::handle thin, MlpLangevinChainParams& p, int64_t dim, Layers& end);

} // namespace jlebm
