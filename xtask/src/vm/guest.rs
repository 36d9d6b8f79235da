//! A guest: booted, listened to until it ends or its time is over.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use super::Kernel;
use super::debian::{self, Files};
use super::report::Report;
use crate::command;

/// How long a guest may say nothing: an emulated processor is ten to twenty times slower than this
/// one, and shares it with others.
const SILENCE: Duration = Duration::from_secs(15 * 60);
const PROCESSORS: &str = "2";
const MEMORY_MIB: &str = "3072";

/// How often a guest is booted whose kernel dies before it starts anything of ours. With several
/// processors QEMU's emulation sometimes loses the race while the kernel patches its own code (an
/// `int3` that nobody expects).
const BOOTS: u32 = 3;

/// Runs the tests on a kernel. Everything that the guest says is printed, after the seconds since
/// its start, and kept in `target/vm/logs`.
///
/// # Errors
/// When QEMU can't be started.
pub fn run(kernel: &Kernel, files: &Files, initramfs: &Path) -> Result<Report> {
    let logs = debian::cache()?.join("logs");
    fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
    let path = logs.join(format!("{}.log", kernel.name));
    let mut log =
        File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    let mut boots = 1;
    loop {
        let mut guest = Guest::boot(files, initramfs)?;
        let began = Instant::now();
        let mut report = Report::new(kernel, files);
        guest.listen(&mut report, &mut log)?;
        report.took = began.elapsed();
        if report.has_booted() || boots == BOOTS {
            return Ok(report);
        }
        boots += 1;
        println!("the guest's kernel died before it started anything: boot {boots} of {BOOTS}");
    }
}

/// A running QEMU, ended when dropped.
struct Guest(Child);

impl Guest {
    fn boot(files: &Files, initramfs: &Path) -> Result<Self> {
        let program = command::find("qemu-system-x86_64")
            .context("qemu-system-x86_64 is missing: run `cargo xtask setup`")?;
        let mut qemu = Command::new(program);
        // Emulated in software: a machine of a CI is mostly a guest itself, in which nothing else
        // is reliable.
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max"]);
        qemu.args(["-smp", PROCESSORS, "-m", MEMORY_MIB]);
        qemu.args([
            "-nodefaults",
            "-no-user-config",
            "-no-reboot",
            "-display",
            "none",
        ]);
        qemu.args(["-serial", "stdio"]);
        qemu.arg("-kernel").arg(&files.image);
        qemu.arg("-initrd").arg(initramfs);
        // A panic ends it, as there is no reboot.
        qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
        qemu.spawn()
            .map(Self)
            .with_context(|| format!("cannot start `{}`", command::line(&qemu)))
    }

    fn listen(&mut self, report: &mut Report, log: &mut File) -> Result<()> {
        let output = self.0.stdout.take().context("the guest has no output")?;
        let lines = lines(output);
        let began = Instant::now();
        loop {
            match lines.recv_timeout(SILENCE) {
                Ok(line) => {
                    let timed = format!("{:6.1} {line}", began.elapsed().as_secs_f64());
                    println!("{timed}");
                    writeln!(log, "{timed}").context("cannot write the log")?;
                    report.read(&line);
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {
                    println!("nothing for {} minutes: ended", SILENCE.as_secs() / 60);
                    return Ok(());
                }
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What the guest says, line by line, without the terminal's control sequences that the firmware
/// begins with.
fn lines(output: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            let line = line.trim_end_matches('\r');
            let line = line.rsplit('\u{1b}').next().unwrap_or(line);
            if sender.send(line.to_owned()).is_err() {
                return;
            }
        }
    });
    receiver
}
