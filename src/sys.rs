//! Provides safe functions around system calls that need `unsafe`, or that are sound only at one point in the lifetime
//! of a process.
//!
//! This module contains no policy; see `master::pool::supervisor`. Other files with `unsafe` are the signal handlers in
//! `diagnostics/` and `startup/abort_signal.rs`, `logging/`, the heir's journal, and the steps between fork and exec in
//! `privileges/`.

mod cgi_process;
mod descriptors;
mod environment;
mod epoll_exclusive;
mod errors;
pub(crate) mod file_path;
mod guard_link;
mod listener_exec;
pub(crate) mod lock_file;
mod memory;
mod other_processes;
mod process;
mod process_status;
mod receive;
pub(crate) mod signal_handler;
mod signals;
mod sockets;
mod syn_filter;

pub(crate) use self::cgi_process::{begin_like_program, die_of, spawn_in_group};
pub(crate) use self::descriptors::{
    close_all_except, descriptor, hard_descriptor_limit, identity, note_descriptor_limit, open_descriptors, own,
    own_descriptors, raise_descriptor_limit, replace, take_over,
};
pub(crate) use self::environment::{clear_environment, forget_environment, set_environment};
pub(crate) use self::epoll_exclusive::Exclusive;
pub(crate) use self::errors::{BoxError, explain};
pub(crate) use self::guard_link::{announce, announce_by, announce_process};
pub(crate) use self::listener_exec::{LISTEN_FD, ListenerToPass, spawn_with_listener};
pub(crate) use self::memory::return_free_memory;
pub(crate) use self::other_processes::{descriptor_of, ending_of};
pub(crate) use self::process::{
    Ending, clone_with_descriptors, die_with_parent, ended_child, exec, exit_now, expect_one_thread, fork, is_child,
    process_descriptor, reap, signal_process, spawn, thread_name,
};
pub(crate) use self::process_status::{process_kib, process_status};
pub(crate) use self::receive::{receive_with_descriptor, receive_with_descriptors};
pub(crate) use self::signals::{
    alarm_on_term, block_signals, restore_signals, short_name, signal_thread, unblock_signals,
};
pub(crate) use self::sockets::{accept, internet_address, peer_address, register, since_last_received, tcp_queue};
pub(crate) use self::syn_filter::drop_syn_segments;
