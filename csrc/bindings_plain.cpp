// Plain calls on the CPU, from Python's tensors to the kernel in one go.
//
// A call is plain if its tensors are torch.Tensor or Parameter, on the CPU, contiguous, of the shapes that fit and in
// float32 (a chosen logit and a key int64, a mask bool), and its numbers are ints in range. Any other call is answered
// with False, before anything is written: the checks of ops.py then say what is wrong, or the backend prepares it.
// Python needs about a microsecond for the checks of one tensor; here all of them take less.
#include <exception>
#include <new>
#include <type_traits>

#include "bindings_signals.h"
#include "bindings_tensors.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"

namespace jlebm {
namespace {

// layout, of latents.py, whose container is torch.Tensor, list or tuple: whether z lies so, in plain tensors, layers of
// no more than `most` floats in all
bool latents(py::handle z, py::handle layout, int64_t most) {
    Fields fields(layout);
    const py::handle container = fields.next();
    const bool one = is_tensor_class(container);
    if (!one && reinterpret_cast<PyObject*>(Py_TYPE(z.ptr())) != container.ptr()) return false;
    Layers found;
    if (!found.read(z) || (!one && found.chains * found.dim > most)) return false;
    Fields dims(fields.next()), trailing(fields.next());
    if (dims.size() != found.count) return false;
    for (size_t l = 0; l < found.count; ++l)
        if (dims.integer() != found.widths[l] || 2 + Fields(trailing.next()).size() != size_t(found.n_dims[l]))
            return false;
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

// from the layers of the begin to those of the end
void run_chain(MlpLangevinChainParams& p, const Layers& begin, const Layers& end, int n_threads) {
    std::vector<float> start, finish;
    p.z = begin.side_by_side(start);
    if (end.count == 1) {
        p.out = end.rows[0];
    } else {
        finish.resize(size_t(p.chains * end.dim));
        p.out = finish.data();
    }
    cpu_kernels().mlp_langevin_chain(p, n_threads);
    if (end.count > 1) end.take(finish.data());
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
    run_heeding_signals([&] { run_chain(p, begin, end, n_threads); });
    return true;
}

// what empty_like makes of a tensor, or of each in a list or tuple; of the same kind
py::object made_like(py::handle latents, py::handle empty_like) {
    const auto made = [&](py::handle tensor) {
        PyObject* const made = PyObject_CallOneArg(empty_like.ptr(), tensor.ptr());
        if (made == nullptr) {
            const bool of_torch = PyErr_ExceptionMatches(PyExc_Exception); // the general way may do with less memory
            const py::error_already_set error;
            if (of_torch) throw error;
            throw RaisedForCaller{std::make_exception_ptr(error)}; // Ctrl-C
        }
        return py::reinterpret_steal<py::object>(made);
    };
    if (!PyList_Check(latents.ptr()) && !PyTuple_Check(latents.ptr())) return made(latents);
    Fields layers(latents);
    py::list all(layers.size());
    for (size_t l = 0; l < layers.size(); ++l)
        PyList_SET_ITEM(all.ptr(), Py_ssize_t(l), made(layers.next()).release().ptr());
    return PyTuple_Check(latents.ptr()) ? py::object(py::tuple(all)) : all;
}

// `fields` as a named tuple of class `cls`
py::object named(py::handle cls, const py::tuple& fields) {
    const py::tuple arguments = py::make_tuple(fields);
    PyObject* const made = PyTuple_Type.tp_new(reinterpret_cast<PyTypeObject*>(cls.ptr()), arguments.ptr(), nullptr);
    if (made == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(made);
}

// what a chain tells of itself: energy, grad_norm, displacement and first_bad_step, or nothing
class Told {
public:
    void ask(int64_t kept, int64_t chains, RecordParams& to) {
        for (float** const rows : {&to.energy, &to.grad_norm, &to.displacement})
            *rows = tensors_.emplace_back(kFloat32, kept, chains).data<float>();
        to.first_bad_step = tensors_.emplace_back(kInt64, chains).data<int64_t>();
    }

    std::vector<py::object> made() {
        std::vector<py::object> made;
        for (NewTensor& tensor : tensors_) made.push_back(tensor.made());
        return made;
    }

private:
    std::vector<NewTensor> tensors_;
};

// memory for them, as tensors at once
py::tuple new_record(int64_t kept, int64_t chains) {
    if (kept < 0 || chains < 0) throw std::invalid_argument("kept steps and chains must not be negative");
    RecordParams nowhere;
    Told told;
    told.ask(kept, chains, nowhere);
    const std::vector<py::object> made = told.made();
    return py::make_tuple(made[0], made[1], made[2], made[3]);
}

struct Made {
    py::object end; // null where torch made it otherwise than z lies
    std::vector<py::object> told;
};

// The chain p from z, which begin has read: its end as z is, and what is told. Torch makes the tensors while the other
// threads compute already; an end of at most `most` floats they write aside meanwhile.
Made made_chain(MlpLangevinChainParams& p, py::handle z, const Layers& begin, Told& told, py::handle empty_like,
                int64_t most, int n_threads) {
    const bool aside = begin.count > 1 || (n_threads > 1 && p.chains * begin.dim <= most);
    std::vector<float> start, rows(aside ? size_t(p.chains * begin.dim) : 0);
    Made made;
    Layers end;
    p.z = begin.side_by_side(start);
    if (aside) {
        p.out = rows.data();
    } else {
        made.end = made_like(z, empty_like);
        if (!end.read(made.end) || !end.same_shapes(begin)) return {};
        p.out = end.rows[0];
    }

    std::exception_ptr failed;
    const HeedsSignals signals;
    {
        std::optional<py::gil_scoped_release> unlocked;
        const Meanwhile torch_makes([&] {
            try {
                if (aside) made.end = made_like(z, empty_like);
                made.told = told.made();
            } catch (...) {
                failed = std::current_exception();
            }
            unlocked.emplace();
        });
        if (p.chains > 0) cpu_kernels().mlp_langevin_chain(p, n_threads);
    }
    signals.raise();
    if (failed) std::rethrow_exception(failed);
    if (aside) {
        if (!end.read(made.end) || !end.same_shapes(begin)) return {};
        end.take(rows.data());
    }
    return made;
}

// mlp_langevin_chain with all that it gives made here: the end of the chain as z is, or (end, info) with info None or
// the class of a named tuple (energy, grad_norm, displacement, first_bad_step, trajectory). negative: energies are told
// as -f. most: see made_chain.
py::object chain_of_latents(py::handle z, py::handle mlp, py::handle update, py::handle n_steps, py::handle thin,
                            py::handle info, bool negative, py::handle empty_like, int64_t most, int n_threads) {
    MlpLangevinChainParams p;
    Layers begin;
    if (!integer_of(n_steps, std::numeric_limits<int64_t>::max(), p.n_steps) || !begin.read(z) ||
        !integer_of(thin, std::numeric_limits<int64_t>::max(), p.record.thin) || p.record.thin == 0)
        return py::none();
    p.chains = begin.chains;
    if (!mlp_of(mlp, p.chains, begin.dim, p.mlp) || !update_of(update, p.chains, begin.dim, p.n_steps, p.update))
        return py::none();
    const int64_t kept = p.n_steps / p.record.thin;
    Told told;
    if (!info.is_none()) told.ask(kept, p.chains, p.record);
    Made made = made_chain(p, z, begin, told, empty_like, most, n_threads);
    if (!made.end) return py::none();
    if (info.is_none()) return made.end;
    const int64_t to_negate = negative ? kept * p.chains : 0;
    for (int64_t i = 0; i < to_negate; ++i) p.record.energy[i] = -p.record.energy[i];
    const std::vector<py::object>& told_of = made.told;
    return py::make_tuple(made.end,
                          named(info, py::make_tuple(told_of[0], told_of[1], told_of[2], told_of[3], py::none())));
}

// --- the registered operators of registration.py, all arguments of a call in a tuple: what they return, or None

bool is_served(py::handle backend) {
    return PyUnicode_Check(backend.ptr()) && (PyUnicode_CompareWithASCIIString(backend.ptr(), "auto") == 0 ||
                                              PyUnicode_CompareWithASCIIString(backend.ptr(), "cpu") == 0);
}

// the net of the arguments behind z; spec_of(text, out_scale) is its MLPSpec
bool mlp_of_arguments(py::handle arguments, Fields& rest, py::handle spec_of, int64_t chains, int64_t dim,
                      MlpParams& p) {
    PyObject* const text_and_scale[] = {PyTuple_GET_ITEM(arguments.ptr(), 5), PyTuple_GET_ITEM(arguments.ptr(), 6)};
    const py::object spec =
        py::reinterpret_steal<py::object>(PyObject_Vectorcall(spec_of.ptr(), text_and_scale, 2, nullptr));
    if (!spec) throw py::error_already_set();
    if (!mlp_of(spec, rest, chains, dim, p)) return false;
    rest.next(), rest.next();
    return true;
}

// (z, the net's six, backend, precision) -> (energy, grad)
py::object energy_grad_operator(py::tuple arguments, py::handle spec_of, py::handle empty_like, int n_threads) {
    MlpEnergyGradParams p;
    Fields fields(arguments);
    if (fields.size() != 9 || !is_served(PyTuple_GET_ITEM(arguments.ptr(), 7))) return py::none();
    const py::handle z = fields.next();
    int64_t dim;
    if (!z_of(z, p.chains, dim, p.z) || !mlp_of_arguments(arguments, fields, spec_of, p.chains, dim, p.mlp))
        return py::none();
    const py::object grad = made_like(z, empty_like);
    if (!array_of(grad, kFloat32, {p.chains, dim}, p.grad)) return py::none();
    NewTensor energy(kFloat32, p.chains);
    p.energy = energy.data<float>();
    if (p.chains > 0) {
        const py::gil_scoped_release unlocked;
        cpu_kernels().mlp_energy_grad(p, n_threads);
    }
    return py::make_tuple(energy.made(), grad);
}

// (z, the net's six, the update's ten, n_steps, diagnostics, trajectory, thin, backend, precision) -> [end, ...]
py::object chain_operator(py::tuple arguments, py::handle spec_of, py::handle empty_like, int64_t most, int n_threads) {
    MlpLangevinChainParams p;
    Layers begin;
    Fields fields(arguments);
    if (fields.size() != 23) return py::none();
    Fields last(&PyTuple_GET_ITEM(arguments.ptr(), 17), 6);
    const py::handle z = fields.next(), n_steps = last.next(), diagnostics = last.next(), trajectory = last.next(),
                     thin = last.next();
    if (trajectory.ptr() != Py_False || !is_served(last.next()) ||
        !integer_of(n_steps, std::numeric_limits<int64_t>::max(), p.n_steps) || !begin.read(z) ||
        begin.n_dims[0] != 2 || !integer_of(thin, std::numeric_limits<int64_t>::max(), p.record.thin) ||
        p.record.thin == 0)
        return py::none();
    p.chains = begin.chains;
    if (!mlp_of_arguments(arguments, fields, spec_of, p.chains, begin.dim, p.mlp) ||
        !update_of(fields, p.chains, begin.dim, p.n_steps, p.update))
        return py::none();
    Told told;
    if (diagnostics.ptr() == Py_True) told.ask(p.n_steps / p.record.thin, p.chains, p.record);
    Made made = made_chain(p, z, begin, told, empty_like, most, n_threads);
    if (!made.end) return py::none();
    py::list results;
    results.append(made.end);
    for (const py::object& value : made.told) results.append(value);
    return results;
}

// What a record's own reader throws (an unknown activation, say) is for the checks of ops.py to put in words.
template <auto operation, class... Arguments>
auto plain(Arguments... arguments) -> decltype(operation(arguments...)) {
    using Answer = decltype(operation(arguments...));
    const auto no = [] {
        if constexpr (std::is_same_v<Answer, bool>)
            return false;
        else
            return Answer(py::none());
    };
    if (!can_read_tensors()) return no();
    try {
        return operation(arguments...);
    } catch (const RaisedForCaller& raised) {
        std::rethrow_exception(raised.error);
    } catch (const py::builtin_exception&) {
        return no();
    } catch (const py::error_already_set&) {
        return no();
    } catch (const std::invalid_argument&) {
        return no();
    } catch (const std::bad_alloc&) {
        return no();
    }
}

} // namespace

void bind_plain(py::module_& m) {
    m.def("read_tensors_through", &read_tensors_through, py::arg("capsule"), py::arg("tensor"), py::arg("parameter"),
          py::arg("widest"),
          "give the plain calls DLPack's table, torch's classes and the widest layer; whether they know the table");
    m.def("new_record", &new_record, py::arg("kept"), py::arg("chains"),
          "tensors for energy, grad_norm, displacement [kept, chains] and first_bad_step [chains]");
    m.def("plain_latents", &plain<latents, py::handle, py::handle, int64_t>);
    m.def("plain_langevin_noise",
          &plain<langevin_noise, py::handle, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_langevin_step", &plain<langevin_step, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_mlp_energy_grad", &plain<mlp_energy_grad, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_mlp_energy_layers",
          &plain<mlp_energy_layers, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, int>);
    m.def("plain_mlp_weight_grads", &plain<mlp_weight_grads, py::handle, py::handle, py::handle, py::handle, py::handle,
                                           py::handle, py::handle, int>);
    m.def("plain_chain_of_latents", &plain<chain_of_latents, py::handle, py::handle, py::handle, py::handle, py::handle,
                                           py::handle, bool, py::handle, int64_t, int>);
    m.def("plain_energy_grad_operator", &plain<energy_grad_operator, py::tuple, py::handle, py::handle, int>);
    m.def("plain_chain_operator", &plain<chain_operator, py::tuple, py::handle, py::handle, int64_t, int>);
    m.def("plain_mlp_langevin_chain",
          &plain<mlp_langevin_chain, py::handle, py::handle, py::handle, py::handle, py::handle, py::handle, int>);
}

} // namespace jlebm
