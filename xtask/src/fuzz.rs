//! The fuzz targets: which there are, how they are built, and running each for a bounded time.
//!
//! cargo-fuzz builds them, and libFuzzer, which is linked into each of them, runs them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

use crate::{command, places};

/// The version of cargo-fuzz that the targets are built with.
pub const VERSION: &str = "0.13.2";
/// No address sanitizer. All that is fuzzed is safe Rust, where an access out of bounds is a panic;
/// and a sanitizer needs a runtime that rustup brings, but Debian's compiler does not. Without one
/// any stable compiler will do.
const SANITIZER: &str = "none";
/// How long one input may take, in seconds: a thousand times what any takes, so that only one that
/// hangs takes it.
const INPUT_SECONDS: u32 = 10;
/// How much memory a target may use, in MiB. The corpus and libFuzzer itself take a tenth of it.
const MEMORY_MIB: u32 = 1024;

/// The trusted cargo-fuzz, if one is installed: this workspace's own, else the one in cargo's home.
pub fn tool() -> Option<PathBuf> {
    [places::tools().ok(), places::cargo_home()]
        .into_iter()
        .flatten()
        .map(|root| root.join("bin/cargo-fuzz"))
        .find(|program| {
            command::output(Command::new(program).arg("--version"))
                .is_some_and(|version| version.trim() == format!("cargo-fuzz {VERSION}"))
        })
}

/// The command that installs this workspace's own cargo-fuzz.
///
/// # Errors
/// When the target directory can't be told.
pub fn install() -> Result<Command> {
    let mut install = Command::new(places::cargo());
    install.args(["install", "cargo-fuzz", "--locked", "--force"]);
    install
        .args(["--version", VERSION, "--root"])
        .arg(places::tools()?);
    Ok(install)
}

/// What somebody types where it can't be installed for them.
pub fn install_by_hand() -> String {
    format!("cargo install cargo-fuzz --locked --version {VERSION}")
}

/// cargo with a verb, for the package of the targets.
pub fn cargo(verb: &str) -> Command {
    let mut cargo = Command::new(places::cargo());
    cargo
        .arg(verb)
        .arg("--manifest-path")
        .arg(package().join("Cargo.toml"));
    cargo
}

/// Runs each of the targets with these names (all when there are none) for so many seconds.
///
/// # Errors
/// When there is no such target, one can't be built, or one fails on an input: that input is kept,
/// and the error says how to run it again.
pub fn run(names: &[String], seconds: u32) -> Result<ExitCode> {
    let targets = chosen(names)?;
    build()?;
    let mut failures = Vec::new();
    for target in &targets {
        println!("{target}: {seconds} s");
        match target.run(seconds)? {
            Ok(figures) => println!("{target}: {figures}"),
            Err(failure) => {
                println!("{target}: failed");
                failures.push(failure);
            }
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("\n"));
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs one target once, on the input in a file.
///
/// # Errors
/// When not exactly one target is named, or it can't be built.
pub fn reproduce(names: &[String], input: &Path) -> Result<ExitCode> {
    let targets = match names {
        [_] => chosen(names)?,
        _ => bail!("one input is for one target: name it"),
    };
    build()?;
    command::run_for_code(targets[0].program()?.arg(input))
}

/// Where the package of the targets is.
fn package() -> PathBuf {
    places::workspace().join("tests/fuzz")
}

/// Where everything is kept that is made of it.
fn kept() -> Result<PathBuf> {
    Ok(places::target()?.join("fuzz"))
}

fn build() -> Result<()> {
    let Some(tool) = tool() else {
        bail!("cargo-fuzz is missing: run `cargo xtask setup`")
    };
    let mut build = Command::new(tool);
    build.args(["build", "--sanitizer", SANITIZER, "--fuzz-dir"]);
    build
        .arg(package())
        .arg("--target-dir")
        .arg(kept()?.join("build"));
    // It takes flags from the one variable and gives its own in it; cargo would prefer the other
    // one.
    build
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    command::run(&mut build).context("the fuzz targets were not built")
}

fn chosen(names: &[String]) -> Result<Vec<Target>> {
    let known = known()?;
    if let Some(unknown) = names.iter().find(|name| !known.contains(name)) {
        bail!(
            "there is no fuzz target {unknown}; those are {}",
            known.join(", ")
        );
    }
    let names = if names.is_empty() { &known } else { names };
    Ok(names.iter().cloned().map(Target).collect())
}

/// The names of all targets: one for each file.
fn known() -> Result<Vec<String>> {
    let directory = package().join("targets");
    let files = fs::read_dir(&directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    let mut names: Vec<_> = files
        .iter()
        .map(|file| Path::new(&file.file_name()).with_extension(""))
        .map(|name| name.to_string_lossy().into_owned())
        .collect();
    names.sort();
    Ok(names)
}

struct Target(String);

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl Target {
    /// The target as it was built, with its limits.
    fn program(&self) -> Result<Command> {
        let build = kept()?.join("build");
        // cargo-fuzz builds for the machine that it was itself built on, and names a directory
        // after it.
        let program = fs::read_dir(&build)
            .with_context(|| format!("cannot list {}", build.display()))?
            .flatten()
            .map(|directory| directory.path().join("release").join(&self.0))
            .find(|program| command::is_executable(program))
            .with_context(|| {
                format!(
                    "there is no program {self}: is it among the [[bin]] of tests/fuzz/Cargo.toml?"
                )
            })?;
        let mut command = Command::new(program);
        command
            .arg(format!("-timeout={INPUT_SECONDS}"))
            .arg(format!("-rss_limit_mb={MEMORY_MIB}"))
            .env("RUST_BACKTRACE", "1");
        Ok(command)
    }

    /// What came of it: figures, or which input it failed on.
    fn run(&self, seconds: u32) -> Result<Result<Figures, String>> {
        let (corpus, artifacts) = (self.directory("corpus")?, self.directory("artifacts")?);
        let seeds = package().join("seeds").join(&self.0);
        if !seeds.is_dir() {
            bail!("{self} has no seeds: put some into {}", seeds.display());
        }
        let log = kept()?.join(format!("{self}.log"));
        let mut program = self.program()?;
        program
            .arg(format!("-max_total_time={seconds}"))
            .arg("-print_final_stats=1")
            .arg(format!("-artifact_prefix={}/", artifacts.display()));
        let dictionary = package().join(format!("dictionaries/{self}.dict"));
        if dictionary.is_file() {
            program.arg(format!("-dict={}", dictionary.display()));
        }
        // New inputs go to the first directory.
        program.arg(&corpus).arg(&seeds);
        program.stdin(Stdio::null()).stdout(Stdio::null());
        program.stderr(
            fs::File::create(&log).with_context(|| format!("cannot write {}", log.display()))?,
        );
        let status = program
            .status()
            .with_context(|| format!("cannot start `{}`", command::line(&program)))?;
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        if status.success() {
            return Ok(Ok(Figures::of(&text, &corpus)?));
        }
        Ok(Err(format!(
            "fuzz target {self} failed ({status}), see {}\n{}",
            log.display(),
            self.failure(&text)
        )))
    }

    fn directory(&self, kind: &str) -> Result<PathBuf> {
        let directory = kept()?.join(kind).join(&self.0);
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(directory)
    }

    /// What to do about a failure, out of libFuzzer's log.
    fn failure(&self, log: &str) -> String {
        let before = std::iter::once("").chain(log.lines());
        // The message of a panic is on the line after the one that says where.
        let what = before.zip(log.lines()).filter_map(|(before, line)| {
            (tells_why(line) || before.contains("panicked at")).then_some(line)
        });
        let again = log
            .lines()
            .find_map(|line| line.split_once("Test unit written to "))
            .map(|(_, input)| format!("again: cargo xtask fuzz {self} --input {}", input.trim()));
        what.map(str::to_owned)
            .chain(again)
            .map(|line| format!("    {line}"))
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// Whether a line of a log says what went wrong: where the panic was, or libFuzzer's verdict.
fn tells_why(line: &str) -> bool {
    line.contains("panicked at")
        || line.starts_with("==") && line.contains("ERROR")
        || line.starts_with("SUMMARY")
}

/// What a target did.
#[derive(Debug, PartialEq, Eq)]
struct Figures {
    executions: String,
    covered: String,
    inputs: usize,
}

impl Figures {
    fn of(log: &str, corpus: &Path) -> Result<Self> {
        let inputs = fs::read_dir(corpus)?.count();
        Self::parse(log, inputs).context("libFuzzer ended without its figures")
    }

    fn parse(log: &str, inputs: usize) -> Option<Self> {
        let executions = log
            .lines()
            .find_map(|line| line.strip_prefix("stat::number_of_executed_units:"))?;
        let mut words = log
            .lines()
            .rfind(|line| line.contains("cov: "))?
            .split_whitespace()
            .skip_while(|word| *word != "cov:");
        Some(Self {
            executions: executions.trim().to_owned(),
            covered: words.nth(1)?.to_owned(),
            inputs,
        })
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            executions,
            covered,
            inputs,
        } = self;
        write!(
            f,
            "{executions} executions, {covered} places of the code reached, {inputs} inputs in the corpus beside the seeds"
        )
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::{Figures, Target, known, package, places};

    const LOG: &str = "INFO: seed corpus: files: 28\n\
        #28\tINITED cov: 100 ft: 200 corp: 20/3Kb exec/s: 0 rss: 40Mb\n\
        #9\tDONE   cov: 1234 ft: 5678 corp: 90/4Kb lim: 4096 exec/s: 4 rss: 41Mb\n\
        Done 99 runs in 21 second(s)\n\
        stat::number_of_executed_units: 99\n";

    #[test]
    fn figures_are_those_of_the_end() {
        let figures = Figures::parse(LOG, 7).unwrap();
        assert_eq!(
            (&*figures.executions, &*figures.covered, figures.inputs),
            ("99", "1234", 7)
        );
        assert_eq!(Figures::parse("", 0), None);
    }

    #[test]
    fn a_failure_says_what_and_how_to_see_it_again() {
        let log = "#5 NEW cov: 1\n\
            thread '<unnamed>' (7) panicked at tests/fuzz/targets/a.rs:1:1:\n\
            index out of bounds\n\
            ==7== ERROR: libFuzzer: deadly signal\n\
            artifact_prefix='/t/'; Test unit written to /t/crash-1\n";
        let failure = Target("a".to_owned()).failure(log);
        for words in [
            "panicked at",
            "index out of bounds",
            "deadly signal",
            "cargo xtask fuzz a --input /t/crash-1",
        ] {
            assert!(failure.contains(words), "{failure}");
        }
    }

    #[test]
    fn every_target_has_seeds_and_is_a_program() {
        let manifest = std::fs::read_to_string(package().join("Cargo.toml")).unwrap();
        for name in known().unwrap() {
            assert!(
                manifest.contains(&format!("path = \"targets/{name}.rs\"")),
                "{name}"
            );
            let seeds = package().join("seeds").join(&name);
            assert!(std::fs::read_dir(seeds).unwrap().count() > 0, "{name}");
        }
    }

    /// Else something else is fuzzed than what is shipped. The remedy is in the message.
    #[test]
    fn the_targets_are_locked_to_what_the_workspace_is_locked_to() {
        let lock = |file| std::fs::read_to_string(places::workspace().join(file)).unwrap();
        let shipped = lock("Cargo.lock");
        let mut versions: HashMap<&str, Vec<&str>> = HashMap::new();
        for (name, version) in packages(&shipped) {
            versions.entry(name).or_default().push(version);
        }
        for (name, version) in packages(&lock("tests/fuzz/Cargo.lock")) {
            let is_shipped = versions
                .get(name)
                .is_none_or(|versions| versions.contains(&version));
            assert!(
                is_shipped,
                "{name} {version} is fuzzed, another one shipped: cp Cargo.lock tests/fuzz/ && cargo xtask fuzz"
            );
        }
    }

    fn packages(lock: &str) -> impl Iterator<Item = (&str, &str)> {
        lock.split("[[package]]").filter_map(|package| {
            let field = |name: &str| {
                let value = package.lines().find_map(|line| line.strip_prefix(name))?;
                Some(value.trim_matches('"'))
            };
            Some((field("name = ")?, field("version = ")?))
        })
    }
}
