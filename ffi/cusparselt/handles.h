// Owners of cuSPARSELt's objects: each is destroyed once, by the library that made it.
//
// The library's objects know each other by address, so they stay where they were made: an owner can
// be moved, what it owns cannot. Destroy in the reverse order of creation, that is, declare owners
// in the order of creation. That is a call with the context's handle like any other, so it is done
// under the context's lock (InContext, context.h). An error while destroying has nobody to go to
// and is ignored.
#ifndef ESPARSE_FFI_CUSPARSELT_HANDLES_H_
#define ESPARSE_FFI_CUSPARSELT_HANDLES_H_

#include <cstdint>
#include <memory>
#include <utility>

#include "cusparselt/abi.h"
#include "cusparselt/library.h"
#include "status.h"

namespace esparse::cusparselt {

template <typename Data>
struct Destroyer {
  Status (*destroy)(const Data* data);
  void operator()(Data* data) const {
    destroy(data);
    delete data;
  }
};

// An object, or nothing. Move-only.
template <typename Data>
using Owner = std::unique_ptr<Data, Destroyer<Data>>;

// Makes an object by `init`, a function of Data* that returns ffi::Error; what was not made is not
// destroyed.
template <typename Data, typename Init>
ffi::ErrorOr<Owner<Data>> Make(Status (*destroy)(const Data*), Init init) {
  auto data = std::make_unique<Data>();  // zeros, which the library takes for "not made yet"
  ESPARSE_RETURN_IF_ERROR(init(data.get()));
  return Owner<Data>(data.release(), Destroyer<Data>{destroy});
}

using Handle = Owner<HandleData>;
using Matrix = Owner<MatrixData>;
using Selection = Owner<SelectionData>;
using PlanHandle = Owner<PlanData>;
using Matmul = std::unique_ptr<MatmulData>;  // nothing in the library destroys one

// The library's context on the GPU that is current when it is made: it belongs to that one.
inline ffi::ErrorOr<Handle> MakeHandle(const Library& library) {
  return Make<HandleData>(library.functions().Destroy, [&](HandleData* handle) -> ffi::Error {
    ESPARSE_CUSPARSELT_CALL(library, Init, handle);
    return ffi::Error::Success();
  });
}

constexpr uint32_t kAlignment = 16;  // bytes, of every buffer; the only value the library takes

inline ffi::ErrorOr<Matrix> MakeDense(const Library& library, const Handle& handle, int64_t rows,
                                      int64_t columns, int64_t ld, int type, int order) {
  return Make<MatrixData>(
      library.functions().MatDescriptorDestroy, [&](MatrixData* matrix) -> ffi::Error {
        ESPARSE_CUSPARSELT_CALL(library, DenseDescriptorInit, handle.get(), matrix, rows, columns,
                                ld, kAlignment, type, order);
        return ffi::Error::Success();
      });
}

// The 2:4 weight, row-major.
inline ffi::ErrorOr<Matrix> MakeSparse(const Library& library, const Handle& handle, int64_t rows,
                                       int64_t columns, int type) {
  return Make<MatrixData>(
      library.functions().MatDescriptorDestroy, [&](MatrixData* matrix) -> ffi::Error {
        ESPARSE_CUSPARSELT_CALL(library, StructuredDescriptorInit, handle.get(), matrix, rows,
                                columns, columns, kAlignment, type, kOrderRow, kHalfSparse);
        return ffi::Error::Success();
      });
}

}  // namespace esparse::cusparselt

#endif  // ESPARSE_FFI_CUSPARSELT_HANDLES_H_
