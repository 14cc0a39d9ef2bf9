//! Executes a program that inherits a listening socket as descriptor 3, with the environment variables of
//! sd_listen_fds(3).
//!
//! `LISTEN_PID` contains the program's own process id, which is known only after the fork. The standard library has
//! built the environment by then. Everything is therefore prepared before the fork, and the child writes the number into
//! the prepared environment and executes the program itself.
#![expect(unsafe_code, reason = "part of the fence: see `sys.rs`")]

use std::ffi::{CString, OsStr, OsString};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::process::{Child, Command};

use nix::errno::Errno;

use super::process::spawn_and;

/// The descriptor of the listening socket in the program (`SD_LISTEN_FDS_START`).
pub(crate) const LISTEN_FD: RawFd = 3;
const LISTEN_PID: &[u8] = b"LISTEN_PID=";
/// Number of digits of the highest process id, and the null byte.
const PID_LENGTH: usize = 11;

/// A listening socket that a program inherits.
#[derive(Debug)]
pub(crate) struct ListenerToPass {
    socket: OwnedFd,
    /// Occupies [`LISTEN_FD`] in this process if nothing else does, so that the standard library's pipe for errors does
    /// not get this number in the child.
    _place: OwnedFd,
}

impl ListenerToPass {
    /// Must be called before the other descriptors for the program are opened, so that none of them has the number
    /// [`LISTEN_FD`].
    ///
    /// # Errors
    /// Fails if no descriptor is available.
    pub(crate) fn new(socket: OwnedFd) -> io::Result<Self> {
        let _place = socket.try_clone()?; // this is the lowest free number from 3 on
        Ok(Self { socket, _place })
    }

    /// Returns another descriptor of the socket.
    ///
    /// # Errors
    /// Fails if no descriptor is available.
    pub(crate) fn duplicate(&self) -> io::Result<OwnedFd> {
        self.socket.try_clone()
    }
}

/// Like [`super::spawn`]. The program also inherits the listening socket as [`LISTEN_FD`], and has `LISTEN_FDS` and
/// `LISTEN_PID` set. `name` is the program's first argument. If `clear`, the environment consists only of the variables
/// that are set in `command`.
///
/// # Errors
/// Fails as [`super::spawn`] does, or if an argument or variable contains a null byte.
pub(crate) fn spawn_with_listener(
    command: &mut Command,
    name: &OsStr,
    clear: bool,
    pass: &[RawFd],
    listener: &ListenerToPass,
    mut prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<Child> {
    command.env("LISTEN_FDS", "1").env_remove("LISTEN_PID");
    let mut exec = PreparedExec::new(command, name, clear)?;
    let socket = listener.socket.as_raw_fd();
    let prepare = move || {
        prepare()?;
        // SAFETY: plain system call. The child uses neither descriptor otherwise: see `ListenerToPass::new`.
        let copied = unsafe { libc::dup2(socket, LISTEN_FD) };
        if copied < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    spawn_and(command, &[pass, &[LISTEN_FD]].concat(), prepare, move || Err(exec.run()))
}

/// The arguments of execve(2), with space for the process id.
struct PreparedExec {
    /// Owns the strings to which the pointers lead.
    _strings: Vec<CString>,
    program: CString,
    arguments: Vec<*const libc::c_char>,
    environment: Vec<*const libc::c_char>,
    /// `LISTEN_PID=`, the digits, and a null byte. The environment contains a pointer to it.
    pid: Box<[u8]>,
}

// SAFETY: the pointers lead to memory that the value owns, and that does not move with the value. Nothing is written
// except through `&mut self`.
unsafe impl Send for PreparedExec {}
// SAFETY: as above.
unsafe impl Sync for PreparedExec {}

impl PreparedExec {
    fn new(command: &Command, name: &OsStr, clear: bool) -> io::Result<Self> {
        let program = CString::new(command.get_program().as_bytes())?;
        let arguments = [name].into_iter().chain(command.get_args()).map(|text| CString::new(text.as_bytes()));
        let arguments: Vec<CString> = arguments.collect::<Result<_, _>>()?;
        let pair =
            |(name, value): (OsString, OsString)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat());
        let environment: Vec<CString> =
            environment_of(command, clear).into_iter().map(pair).collect::<Result<_, _>>()?;
        let pid = [LISTEN_PID, &[0; PID_LENGTH]].concat().into_boxed_slice();
        let pointers = |strings: &[CString]| strings.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (mut to_arguments, mut to_environment) = (pointers(&arguments), pointers(&environment));
        to_arguments.push(std::ptr::null());
        to_environment.extend([pid.as_ptr().cast(), std::ptr::null()]);
        let strings = arguments.into_iter().chain(environment).collect();
        Ok(Self { _strings: strings, program, arguments: to_arguments, environment: to_environment, pid })
    }

    /// Executes the program. Returns only on failure. Async-signal-safe.
    fn run(&mut self) -> io::Error {
        let digits = &mut self.pid[LISTEN_PID.len()..];
        write_number(digits, nix::unistd::getpid().as_raw().unsigned_abs());
        let environment = self.environment.as_mut_slice();
        if let [.., pid, _] = environment {
            *pid = self.pid.as_ptr().cast(); // derived again, after the write
        }
        // SAFETY: both arrays end with a null pointer, and their strings end with a null byte. `self` owns all of them.
        unsafe { libc::execve(self.program.as_ptr(), self.arguments.as_ptr(), self.environment.as_ptr()) };
        Errno::last().into()
    }
}

/// Writes a number in decimal, and null bytes after it.
fn write_number(to: &mut [u8], number: u32) {
    to.fill(0);
    let length = number.checked_ilog10().unwrap_or(0) as usize + 1;
    let mut rest = number;
    for digit in to.iter_mut().take(length).rev() {
        *digit = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
    }
}

/// Returns the environment with which the standard library would execute the command.
fn environment_of(command: &Command, clear: bool) -> Vec<(OsString, OsString)> {
    let is_changed = |name: &OsStr| command.get_envs().any(|(changed, _)| changed == name);
    let own = std::env::vars_os().filter(|(name, _)| !clear && !is_changed(name));
    let set = command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())));
    own.chain(set).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_in_decimal() {
        for number in [0, 1, 9, 10, 4_194_304, 4_294_967_295] {
            let mut buffer = [b'x'; PID_LENGTH];
            write_number(&mut buffer, number);
            let text = std::ffi::CStr::from_bytes_until_nul(&buffer).unwrap();
            assert_eq!(text.to_str().unwrap(), number.to_string());
        }
    }

    #[test]
    fn the_environment_is_that_of_the_command() {
        let mut command = Command::new("/bin/true");
        command.env("ADDED", "1").env_remove("PATH");
        let names = |clear| -> Vec<_> { environment_of(&command, clear).into_iter().map(|(name, _)| name).collect() };
        assert_eq!(names(true), ["ADDED"]);
        assert!(names(false).contains(&"ADDED".into()) && !names(false).contains(&"PATH".into()));
        assert_eq!(names(false).len(), std::env::vars_os().count()); // PATH is replaced by ADDED
    }
}
