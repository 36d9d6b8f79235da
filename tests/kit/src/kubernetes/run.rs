//! Programs that run to their end within a bounded time.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::fixtures::{Finished, process};

/// Longer than anything that is waited for here.
const ENDS_WITHIN: Duration = Duration::from_secs(180);

/// Runs it with this input.
///
/// # Panics
/// When it can't be started, or goes on for three minutes.
#[track_caller]
pub(super) fn to_its_end(command: &mut Command, input: &[u8]) -> Finished {
    // Files and not pipes: nobody has to empty them while it runs.
    let mut files = [(); 3].map(|()| tempfile::tempfile().expect("a file can be made"));
    let [stdin, stdout, stderr] = &mut files;
    stdin.write_all(input).expect("a file can be written");
    stdin.rewind().expect("a file can be rewound");
    command
        .stdin(handle(stdin))
        .stdout(handle(stdout))
        .stderr(handle(stderr));
    let code = wait(command);
    Finished {
        code,
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

#[track_caller]
fn wait(command: &mut Command) -> i32 {
    // A terminal's Ctrl-C is not for it: it would be a failure, and this process may have more to
    // do before it ends.
    command.process_group(0);
    let child = process::spawn(command);
    let mut child = child.unwrap_or_else(|error| panic!("cannot start {command:?}: {error}"));
    let deadline = Instant::now() + ENDS_WITHIN;
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return status.code().unwrap_or(-1);
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            panic!("{command:?} did not end within {ENDS_WITHIN:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn handle(file: &File) -> Stdio {
    file.try_clone().expect("a file can be shared").into()
}

fn text(file: &mut File) -> String {
    let mut bytes = Vec::new();
    file.rewind().expect("a file can be rewound");
    file.read_to_end(&mut bytes).expect("a file can be read");
    String::from_utf8_lossy(&bytes).into_owned()
}
