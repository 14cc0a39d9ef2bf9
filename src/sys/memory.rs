//! The memory of the process.
#![cfg_attr(target_env = "gnu", expect(unsafe_code, reason = "part of the fence: see `sys.rs`"))]

/// Returns the free memory of the heap to the kernel, as far as it consists of whole pages (`malloc_trim(3)`). Other C
/// libraries than glibc return it by themselves.
pub(crate) fn return_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the function has no preconditions, and touches only memory that is free.
    unsafe {
        libc::malloc_trim(0);
    }
}
