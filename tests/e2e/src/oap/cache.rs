//! What a run needs from package registries, fetched once and kept under the target directory.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, ensure};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest as _, Sha256};

use testkit::scenario::process::{self, command};

/// Where the project's own files for this run are.
const ASSETS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/oap");
/// Lists the jars of a class path.
const DEPENDENCY_PLUGIN: &str = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1";
/// The agent's parent POM was never published; later versions of the plug-in insist on it.
const LENIENT_DEPENDENCY_PLUGIN: &str = "org.apache.maven.plugins:maven-dependency-plugin:2.10";
/// All of Java SE, and what an API server's certificate, the agents' metrics and Netty need
/// besides.
const JRE_MODULES: &str = "java.se,jdk.crypto.ec,jdk.management,jdk.unsupported";
const JAVA_AGENT: &str = "org.apache.skywalking:apm-agent:9.4.0";
/// The checksums of all jars that are run.
const SUMS: &str = "jars.sha256";
const BOOT_SERVICE: &str =
    "META-INF/services/org.apache.skywalking.apm.agent.core.boot.BootService";

/// The fetched programs. One run at a time: a second one fails while this lives.
pub struct Cache {
    directory: PathBuf,
    _lock: Flock<File>,
}

impl Cache {
    /// Fetches and builds what is not there yet, or not as it should be.
    ///
    /// # Errors
    /// With the tail of the log of what failed, and when another run is under way.
    pub fn prepare() -> Result<Self> {
        let cache = Self::lock()?;
        cache.fetch_oap()?;
        cache.build_java_agent()?;
        cache.fetch_python()?;
        Ok(cache)
    }

    /// The same of what is written in Java, and a JRE to take along.
    ///
    /// # Errors
    /// With the tail of the log of what failed, and when another run is under way.
    pub fn prepare_java() -> Result<Self> {
        let cache = Self::lock()?;
        cache.fetch_oap()?;
        cache.build_java_agent()?;
        cache.link_jre()?;
        Ok(cache)
    }

    fn lock() -> Result<Self> {
        let directory = directory()?;
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let lock = File::create(directory.join("lock")).context("cannot make the lock file")?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock)
            .map_err(|(_, error)| anyhow!("another run uses {} ({error})", directory.display()))?;
        let cache = Self {
            directory,
            _lock: lock,
        };
        let logs = cache.logs();
        let _ = fs::remove_dir_all(&logs);
        fs::create_dir_all(&logs).with_context(|| format!("cannot make {}", logs.display()))?;
        Ok(cache)
    }

    /// The logs of the latest run.
    pub fn logs(&self) -> PathBuf {
        self.directory.join("logs")
    }

    /// Where the run's servers keep their data.
    pub fn data(&self) -> PathBuf {
        self.directory.join("data")
    }

    /// The class path of OAP and `ZooKeeper`, the configuration folder before all.
    ///
    /// # Errors
    /// When the cache was damaged.
    pub fn oap_class_path(&self) -> Result<String> {
        let jars = self.oap_jars()?.into_iter().map(PathBuf::into_os_string);
        let jars: Vec<_> = [asset("conf").into_os_string()]
            .into_iter()
            .chain(jars)
            .collect();
        let path = jars.join(OsStr::new(":")).into_string();
        path.map_err(|path| anyhow!("{} is not UTF-8", path.display()))
    }

    /// The jars of that class path, in its order.
    ///
    /// # Errors
    /// When the cache was damaged.
    pub fn oap_jars(&self) -> Result<Vec<PathBuf>> {
        let jars = fs::read_to_string(self.jars()).context("cannot read the cached class path")?;
        Ok(jars.trim().split(':').map(PathBuf::from).collect())
    }

    /// The directory of the JRE, from [`prepare_java`](Self::prepare_java).
    pub fn jre(&self) -> PathBuf {
        self.directory.join("jre")
    }

    /// The directory of the agent, with its configuration and plug-ins, and of the application.
    pub fn java(&self) -> PathBuf {
        self.directory.join("java-agent")
    }

    /// The agent, in a directory with its configuration and plug-ins.
    pub fn java_agent(&self) -> PathBuf {
        self.java().join("skywalking-agent.jar")
    }

    /// The classes of the application that carries the Java agent.
    pub fn java_application(&self) -> PathBuf {
        self.java().join("application")
    }

    /// A program of the Python environment.
    pub fn python_program(&self, name: &str) -> PathBuf {
        self.python().join("bin").join(name)
    }

    fn jars(&self) -> PathBuf {
        self.directory.join("oap-jars")
    }

    fn python(&self) -> PathBuf {
        self.directory.join("python")
    }

    fn fetch_oap(&self) -> Result<()> {
        let pom = asset("pom.xml");
        let inputs = read(&[&pom, &asset(SUMS)])?;
        once("the OAP server (130 MB)", &self.jars(), &inputs, || {
            let mut maven = self.maven(DEPENDENCY_PLUGIN, "build-classpath");
            maven.arg("-f").arg(&pom).arg("-DincludeScope=runtime");
            maven.arg(format!("-Dmdep.outputFile={}", self.jars().display()));
            process::run("fetch-oap", &self.logs(), maven)?;
            self.oap_jars()?.iter().try_for_each(|jar| check_sum(jar))
        })
    }

    fn build_java_agent(&self) -> Result<()> {
        let [span_maker, idle_app, config] = ["SpanMaker.java", "IdleApp.java", "agent.config"]
            .map(|name| asset("agent").join(name));
        let inputs = read(&[&span_maker, &idle_app, &config, &asset(SUMS)])?;
        once("the Java agent (23 MB)", &self.java(), &inputs, || {
            let mut maven = self.maven(LENIENT_DEPENDENCY_PLUGIN, "copy");
            maven.arg(format!("-Dartifact={JAVA_AGENT}"));
            maven.arg(format!("-DoutputDirectory={}", self.java().display()));
            maven.arg("-Dmdep.stripVersion=true");
            process::run("fetch-java-agent", &self.logs(), maven)?;
            fs::rename(self.java().join("apm-agent.jar"), self.java_agent())
                .context("Maven did not copy the agent")?;
            check_sum(&self.java_agent())?;
            self.install(&config, "config/agent.config")?;
            self.compile(&idle_app, &self.java_application())?;
            self.build_plugin(&span_maker)
        })
    }

    fn build_plugin(&self, source: &Path) -> Result<()> {
        let classes = self.java().join("plugin");
        self.compile(source, &classes)?;
        let service = classes.join(BOOT_SERVICE);
        write(&service, "balancer.e2e.SpanMaker\n")?;
        let jar = self.java().join("plugins/span-maker.jar");
        fs::create_dir_all(self.java().join("plugins")).context("cannot make a directory")?;
        let mut command = command("jar");
        command.arg("cf").arg(jar).arg("-C").arg(classes).arg(".");
        process::run("jar", &self.logs(), command)
    }

    fn compile(&self, source: &Path, classes: &Path) -> Result<()> {
        let mut command = command("javac");
        command.args(["--release", "11"]);
        command.arg("-cp").arg(self.java_agent());
        command.arg("-d").arg(classes).arg(source);
        process::run("javac", &self.logs(), command)
    }

    fn install(&self, file: &Path, name: &str) -> Result<()> {
        write(&self.java().join(name), &read(&[file])?)
    }

    /// The JDK's own modules and what makes a JVM of them, without the tools; with a class data
    /// archive, so that it starts sooner.
    fn link_jre(&self) -> Result<()> {
        let jdk = command_output("java", &["-version"])?;
        once("a JRE", &self.jre(), &jdk, || {
            let mut link = command("jlink");
            link.args(["--add-modules", JRE_MODULES]).args([
                "--strip-java-debug-attributes",
                "--no-header-files",
                "--no-man-pages",
            ]);
            link.arg("--output").arg(self.jre());
            process::run("jlink", &self.logs(), link)?;
            let mut dump = command(self.jre().join("bin/java"));
            dump.args(["-XX:+UseSerialGC", "-Xshare:dump"]);
            process::run("share-classes", &self.logs(), dump)
        })
    }

    fn fetch_python(&self) -> Result<()> {
        let list = asset("requirements.txt");
        let what = "the Python agent and Envoy (50 MB)";
        // An environment does not outlive the interpreter that it was made with.
        let interpreter = command_output(
            "python3",
            &["-c", "import sys; print(sys.base_prefix, sys.version)"],
        )?;
        let inputs = read(&[&list])? + &interpreter;
        once(what, &self.python(), &inputs, || {
            let mut venv = command("python3");
            venv.args(["-m", "venv", "--clear"]).arg(self.python());
            process::run("make-venv", &self.logs(), venv)?;
            let mut pip = command(self.python_program("pip"));
            pip.args(["install", "--quiet", "--requirement"]).arg(&list);
            process::run("fetch-python", &self.logs(), pip)
        })
    }

    fn maven(&self, plugin: &str, goal: &str) -> Command {
        let mut maven = command("mvn");
        maven.args(["--batch-mode", "--quiet"]);
        maven.arg(format!("{plugin}:{goal}"));
        let repository = self.directory.join("maven");
        maven.arg(format!("-Dmaven.repo.local={}", repository.display()));
        maven
    }
}

/// One of the project's own files.
pub fn asset(name: &str) -> PathBuf {
    Path::new(ASSETS).join(name)
}

/// Makes `result` anew unless it was made from the same inputs in the same place before.
fn once(what: &str, result: &Path, inputs: &str, make: impl FnOnce() -> Result<()>) -> Result<()> {
    let wanted = format!("{}\n{inputs}", result.display());
    let stamp = result.with_extension("stamp");
    if result.exists() && fs::read_to_string(&stamp).is_ok_and(|made| made == wanted) {
        return Ok(());
    }
    println!("fetching {what}");
    let _ = fs::remove_file(&stamp);
    let _ = fs::remove_dir_all(result);
    make().with_context(|| {
        format!("cannot get {what}; the first run needs Maven Central and PyPI")
    })?;
    write(&stamp, &wanted)
}

/// Fails for a jar that is not one of those that are listed. Until then nothing of it has run.
fn check_sum(jar: &Path) -> Result<()> {
    let list = asset(SUMS);
    let bytes = fs::read(jar).with_context(|| format!("cannot read {}", jar.display()))?;
    let name = jar.file_name().unwrap_or_default().to_string_lossy();
    let line = format!("{}  {name}", oci_archive::hex(&Sha256::digest(&bytes)));
    ensure!(
        read(&[&list])?.lines().any(|known| known == line),
        "{} is not the one in {}: not what Maven Central has, or another version",
        jar.display(),
        list.display()
    );
    Ok(())
}

/// What these files say.
fn read(files: &[&Path]) -> Result<String> {
    let read = |file: &&Path| {
        fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
    };
    files.iter().map(read).collect()
}

/// What a program prints, by which another version of it is known.
fn command_output(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    let printed = [output.stdout, output.stderr].concat();
    Ok(String::from_utf8_lossy(&printed).into_owned())
}

fn write(path: &Path, text: &str) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// `e2e-oap` in the target directory, which this program is two levels below.
fn directory() -> Result<PathBuf> {
    let own = std::env::current_exe().context("cannot tell where this program is")?;
    let target = own
        .ancestors()
        .nth(2)
        .context("this program is not in a target directory")?;
    Ok(target.join("e2e-oap"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_jar_that_is_not_listed_is_not_run() {
        let directory = tempfile::tempdir().expect("a directory");
        let jar = directory.path().join("skywalking-agent.jar");
        fs::write(&jar, "another").expect("written");
        let refused = check_sum(&jar).expect_err("another");
        assert!(format!("{refused:#}").contains(SUMS), "{refused:#}");
    }
}
