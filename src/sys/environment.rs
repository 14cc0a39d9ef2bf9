//! Changes the environment of this process.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::ffi::OsStr;

/// Sets a variable in this process's environment. May only be called in a child that has just been forked.
pub(crate) fn set_environment(name: &str, value: impl AsRef<OsStr>) {
    // SAFETY: a freshly forked child has one thread (see `fork`), so no other thread reads the environment.
    unsafe { std::env::set_var(name, value) }
}

/// Removes all variables from this process's environment. May only be called in a child that has just been forked.
pub(crate) fn clear_environment() {
    for (name, _) in std::env::vars_os() {
        // SAFETY: as in `set_environment`.
        unsafe { std::env::remove_var(name) }
    }
}

/// Removes variables from this process's environment. May only be called in a child that has just been forked.
pub(crate) fn forget_environment(names: &[&[&str]]) {
    for name in names.iter().copied().flatten() {
        // SAFETY: as in `set_environment`.
        unsafe { std::env::remove_var(name) }
    }
}
