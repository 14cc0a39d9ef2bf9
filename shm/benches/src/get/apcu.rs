//! Runs APCu. A PHP script fills APCu and times itself, because only PHP code can read APCu's values.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use crate::error::Error;
use crate::get::data::Data;
use crate::get::line::{Talk, task_words};
use crate::get::measure::{Sample, Task};
use crate::get::server::Program;

const PROGRAM: Program = Program { name: "php", package: "php-cli" };
const SCRIPT: &str = include_str!("../../apcu.php");

#[derive(Debug)]
pub(crate) struct Apcu {
    talk: Talk,
    child: Child,
    /// Whether the script can fork.
    pub(crate) forks: bool,
    /// Time of one iteration of the script's loop without APCu.
    pub(crate) empty_loop_ns: f64,
}

impl Apcu {
    /// Starts the script. The script fills and checks its cache before this function returns.
    pub(crate) fn start(dir: &Path, data: &Data) -> Result<Apcu, Error> {
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.join(name);
            fs::write(&path, bytes).map(|()| path).map_err(Error::system("writing a file for PHP"))
        };
        let script = write("apcu.php", SCRIPT.as_bytes())?;
        let keys = write("keys", data.keys.as_flattened())?;
        let sequence: Vec<u8> = data.sequence.iter().flat_map(|index| index.to_le_bytes()).collect();
        let sequence = write("sequence", &sequence)?;
        let megabytes = (data.shape.bytes() + u64::from(data.shape.keys) * 256) * 3 / 2 / (1 << 20) + 64;
        let mut command = Command::new(PROGRAM.name);
        for setting in ["apc.enable_cli=1", "opcache.enable_cli=1", "memory_limit=-1", "max_execution_time=0"] {
            command.args(["-d", setting]);
        }
        command.args(["-d", &format!("apc.shm_size={megabytes}M")]);
        command.args(["-d", &format!("apc.entries_hint={}", data.shape.keys)]);
        command.arg(script).arg(keys).arg(sequence).arg(data.shape.size.to_string());
        let mut child = PROGRAM.spawn(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let (Some(to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(PROGRAM.error("the process has no standard input and output"));
        };
        let mut apcu = Apcu { talk: Talk::new(from, to), child, forks: false, empty_loop_ns: 0.0 };
        apcu.greet()?;
        Ok(apcu)
    }

    fn greet(&mut self) -> Result<(), Error> {
        let line = self.talk.hear()?.unwrap_or_default();
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        match words.as_slice() {
            ["missing", package @ ("php-apcu" | "php-cli")] => {
                let package = if *package == "php-cli" { "php-cli" } else { "php-apcu" };
                return Err(Error::NoProgram { program: "APCu for php", package });
            }
            ["ok", forks, empty_loop] => {
                self.forks = *forks == "1";
                self.empty_loop_ns = empty_loop.parse().unwrap_or_default();
            }
            _ => return Err(PROGRAM.error(format!("the script says: {line}"))),
        }
        Ok(())
    }

    /// Measures with this number of concurrent processes.
    pub(crate) fn measure(&mut self, task: Task, processes: usize) -> Result<Vec<Sample>, Error> {
        self.talk.say(&format!("{} {processes}", task_words(task)))?;
        (0..processes).map(|_| self.talk.sample()).collect()
    }
}

impl Drop for Apcu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
