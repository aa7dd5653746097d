// Python's tuples as records of params.h: shared by the bindings of the CPU and of CUDA.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "params.h"

namespace py = pybind11;

namespace jlebm {

// the operations of csrc/cuda/launch.h, on a device or on the host; what needs no device of csrc/cuda/status.h
void bind_cuda(py::module_& m);
// questions to the driver
void bind_cuda_devices(py::module_& m);

using Address = uintptr_t;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// (widths, activations, activation params, head, out_scale, weight addresses, bias addresses, context_bias, logit)
using MlpTuple = std::tuple<std::vector<int>, std::vector<int>, std::vector<float>, int, float, std::vector<Address>,
                            std::vector<Address>, Address, Address>;
// (step_coefficients, chain_coefficients, prior_mean, stride, prior_precision, stride, frozen, stride, noise,
//  extra_grad, noise_key, first_step, first_chain)
using UpdateTuple = std::tuple<Address, Address, Address, int64_t, Address, int64_t, Address, int64_t, Address, Address,
                               uint64_t, uint32_t, uint32_t>;
// (thin, energy, grad_norm, displacement, first_bad_step, trajectory)
using RecordTuple = std::tuple<int64_t, Address, Address, Address, Address, Address>;

inline MlpParams mlp_params(const MlpTuple& t) {
    const auto& [widths, activations, activation_params, head, out_scale, weights, biases, context_bias, logit] = t;
    const size_t n_hidden = activations.size();
    if (n_hidden < 1 || n_hidden > size_t(kMaxHiddenLayers))
        throw std::invalid_argument("an MLP energy has 1 to " + std::to_string(kMaxHiddenLayers) +
                                    " hidden layers here, got " + std::to_string(n_hidden));
    if (widths.size() != n_hidden + 2 || activation_params.size() != n_hidden || weights.size() != n_hidden + 1 ||
        biases.size() != n_hidden + 1)
        throw std::invalid_argument("widths, activations, weights and biases disagree on the number of layers");
    if (head < 0 || head >= int(Head::kCount)) throw std::invalid_argument("unknown head " + std::to_string(head));
    MlpParams p;
    p.n_hidden = int32_t(n_hidden);
    for (size_t i = 0; i < widths.size(); ++i) {
        if (widths[i] < 1) throw std::invalid_argument("widths must be positive, got " + std::to_string(widths[i]));
        p.widths[i] = widths[i];
    }
    for (size_t l = 0; l < n_hidden; ++l) {
        if (activations[l] < 0 || activations[l] >= int(Activation::kCount))
            throw std::invalid_argument("unknown activation " + std::to_string(activations[l]));
        p.activations[l] = Activation(activations[l]);
        p.activation_params[l] = activation_params[l];
    }
    for (size_t l = 0; l <= n_hidden; ++l) {
        p.weights[l] = at<const float>(weights[l]);
        p.biases[l] = at<const float>(biases[l]);
    }
    p.head = Head(head);
    p.out_scale = out_scale;
    p.context_bias = at<const float>(context_bias);
    p.logit = at<const int64_t>(logit);
    return p;
}

inline UpdateParams update_params(const UpdateTuple& t) {
    UpdateParams p;
    Address coefficients, chain_coefficients, mean, precision, frozen, noise, extra_grad;
    std::tie(coefficients, chain_coefficients, mean, p.prior_mean_stride, precision, p.prior_precision_stride, frozen,
             p.frozen_stride, noise, extra_grad, p.noise_key, p.first_step, p.first_chain) = t;
    p.step_coefficients = at<const float>(coefficients);
    p.chain_coefficients = at<const float>(chain_coefficients);
    p.prior_mean = at<const float>(mean);
    p.prior_precision = at<const float>(precision);
    p.frozen = at<const uint8_t>(frozen);
    p.noise = at<const float>(noise);
    p.extra_grad = at<const float>(extra_grad);
    return p;
}

inline RecordParams record_params(const RecordTuple& t) {
    RecordParams p;
    Address energy, grad_norm, displacement, first_bad_step, trajectory;
    std::tie(p.thin, energy, grad_norm, displacement, first_bad_step, trajectory) = t;
    if (p.thin < 1) throw std::invalid_argument("thin must be at least 1, got " + std::to_string(p.thin));
    p.energy = at<float>(energy);
    p.grad_norm = at<float>(grad_norm);
    p.displacement = at<float>(displacement);
    p.first_bad_step = at<int64_t>(first_bad_step);
    p.trajectory = at<float>(trajectory);
    return p;
}

} // namespace jlebm
