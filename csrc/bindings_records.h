// Python's tuples as records of params.h: shared by the bindings of the CPU and of CUDA.
//
// Read item by item with Python's own functions: pybind11's containers would copy every tuple first, which costs more
// than all else that a short call does here.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "params.h"

namespace py = pybind11;

namespace jlebm {

// the operations of csrc/cuda/launch.h, on a device or on the host; what needs no device of csrc/cuda/status.h
void bind_cuda(py::module_& m);
// questions to the driver
void bind_cuda_devices(py::module_& m);
// questions about Python's objects
void bind_objects(py::module_& m);
// operations on Python's tensors, on the CPU
void bind_plain(py::module_& m);

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The items of a tuple or list, one after another; the caller's object outlives it.
class Fields {
public:
    explicit Fields(py::handle sequence) {
        if (PyTuple_Check(sequence.ptr()))
            items_ = &PyTuple_GET_ITEM(sequence.ptr(), 0), size_ = PyTuple_GET_SIZE(sequence.ptr());
        else if (PyList_Check(sequence.ptr()))
            items_ = reinterpret_cast<PyListObject*>(sequence.ptr())->ob_item, size_ = PyList_GET_SIZE(sequence.ptr());
        else
            throw py::type_error("a record must be a tuple or a list");
    }

    Fields(PyObject** items, size_t size) : items_(items), size_(Py_ssize_t(size)) {}

    size_t size() const { return size_t(size_); }

    void expect(size_t n, const char* what) const {
        if (size() != n)
            throw std::invalid_argument(std::string(what) + " has " + std::to_string(n) + " fields, got " +
                                        std::to_string(size()));
    }

    py::handle next() { return items_[next_++]; }

    int64_t integer(int64_t least = std::numeric_limits<int64_t>::min(),
                    int64_t most = std::numeric_limits<int64_t>::max()) {
        const long long value = PyLong_AsLongLong(next().ptr());
        if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
        if (value < least || value > most)
            throw std::invalid_argument("an integer must be in [" + std::to_string(least) + ", " +
                                        std::to_string(most) + "], got " + std::to_string(value));
        return value;
    }

    uint64_t bits() { // 64 of them
        const unsigned long long value = PyLong_AsUnsignedLongLong(next().ptr());
        if (value == ~0ull && PyErr_Occurred()) throw py::error_already_set();
        return value;
    }

    uint32_t counter() { return uint32_t(integer(0, std::numeric_limits<uint32_t>::max())); }

    float real() {
        const double value = PyFloat_AsDouble(next().ptr());
        if (value == -1.0 && PyErr_Occurred()) throw py::error_already_set();
        return float(value);
    }

    template <class T>
    T* address() {
        return at<T>(Address(bits()));
    }

private:
    PyObject** items_ = nullptr;
    Py_ssize_t size_ = 0, next_ = 0;
};

// the next of the fields: widths, activations, activation params, head, out_scale (`MLPSpec.native_fields`)
inline void mlp_constants(Fields& fields, MlpParams& p) {
    Fields widths(fields.next()), activations(fields.next()), activation_params(fields.next());
    const size_t n_hidden = activations.size();
    if (n_hidden < 1 || n_hidden > size_t(kMaxHiddenLayers))
        throw std::invalid_argument("an MLP energy has 1 to " + std::to_string(kMaxHiddenLayers) +
                                    " hidden layers here, got " + std::to_string(n_hidden));
    const int64_t head = fields.integer();
    if (head < 0 || head >= int(Head::kCount)) throw std::invalid_argument("unknown head " + std::to_string(head));
    p.n_hidden = int32_t(n_hidden), p.head = Head(head), p.out_scale = fields.real();
    if (widths.size() != n_hidden + 2 || activation_params.size() != n_hidden)
        throw std::invalid_argument("widths and activations disagree on the number of layers");
    for (size_t i = 0; i < n_hidden + 2; ++i) {
        const int64_t width = widths.integer(std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
        if (width < 1) throw std::invalid_argument("widths must be positive, got " + std::to_string(width));
        p.widths[i] = int32_t(width);
    }
    for (size_t l = 0; l < n_hidden; ++l) {
        const int64_t activation = activations.integer();
        if (activation < 0 || activation >= int(Activation::kCount))
            throw std::invalid_argument("unknown activation " + std::to_string(activation));
        p.activations[l] = Activation(activation);
        p.activation_params[l] = activation_params.real();
    }
}

// (the constants, weight addresses, bias addresses, context_bias, logit)
inline MlpParams mlp_params(py::handle record) {
    Fields fields(record);
    fields.expect(9, "the record of an MLP");
    MlpParams p;
    mlp_constants(fields, p);
    const size_t n_hidden = size_t(p.n_hidden);
    Fields weights(fields.next()), biases(fields.next());
    if (weights.size() != n_hidden + 1 || biases.size() != n_hidden + 1)
        throw std::invalid_argument("widths, weights and biases disagree on the number of layers");
    for (size_t l = 0; l <= n_hidden; ++l) {
        p.weights[l] = weights.address<const float>();
        p.biases[l] = biases.address<const float>();
    }
    p.context_bias = fields.address<const float>();
    p.logit = fields.address<const int64_t>();
    return p;
}

// (step_coefficients, chain_coefficients, prior_mean, stride, prior_precision, stride, frozen, stride, noise,
//  extra_grad, noise_key, first_step, first_chain)
inline UpdateParams update_params(py::handle record) {
    Fields fields(record);
    fields.expect(13, "the record of an update");
    UpdateParams p;
    p.step_coefficients = fields.address<const float>();
    p.chain_coefficients = fields.address<const float>();
    p.prior_mean = fields.address<const float>(), p.prior_mean_stride = fields.integer();
    p.prior_precision = fields.address<const float>(), p.prior_precision_stride = fields.integer();
    p.frozen = fields.address<const uint8_t>(), p.frozen_stride = fields.integer();
    p.noise = fields.address<const float>();
    p.extra_grad = fields.address<const float>();
    p.noise_key = fields.bits();
    p.first_step = fields.counter();
    p.first_chain = fields.counter();
    return p;
}

// (thin, energy, grad_norm, displacement, first_bad_step, trajectory)
inline RecordParams record_params(py::handle record) {
    Fields fields(record);
    fields.expect(6, "what is recorded");
    RecordParams p;
    p.thin = fields.integer();
    if (p.thin < 1) throw std::invalid_argument("thin must be at least 1, got " + std::to_string(p.thin));
    p.energy = fields.address<float>();
    p.grad_norm = fields.address<float>();
    p.displacement = fields.address<float>();
    p.first_bad_step = fields.address<int64_t>();
    p.trajectory = fields.address<float>();
    return p;
}

} // namespace jlebm

namespace pybind11::detail {

#define JLEBM_RECORD(Params, read)                                                                                     \
    template <>                                                                                                        \
    struct type_caster<jlebm::Params> {                                                                                \
        PYBIND11_TYPE_CASTER(jlebm::Params, const_name(#Params));                                                      \
        bool load(handle record, bool) {                                                                               \
            value = jlebm::read(record);                                                                               \
            return true;                                                                                               \
        }                                                                                                              \
    };
JLEBM_RECORD(MlpParams, mlp_params)
JLEBM_RECORD(UpdateParams, update_params)
JLEBM_RECORD(RecordParams, record_params)
#undef JLEBM_RECORD

} // namespace pybind11::detail
