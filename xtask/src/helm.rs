//! The Helm chart: checked with the real helm, which is built from its Go module, and rendered into
//! plain manifests.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use crate::{command, kubernetes, places};

const VERSION: &str = env!("CARGO_PKG_VERSION");
const CHART: &str = "deploy/helm/balancer";
const MANIFESTS: &str = "deploy/manifests/balancer.yaml";
const HEADER: &str = "\
# Made by `cargo xtask manifests` from deploy/helm/balancer: change that, not this.
# Put the image's name of your registry in (`image:`), then: kubectl apply --server-side -f balancer.yaml
";
/// What the plain manifests are called and where they go.
const RELEASE: [&str; 2] = ["balancer", "balancer-system"];
/// Rendered for: helm itself would take a very old Kubernetes where it can ask none.
const KUBERNETES: [&str; 2] = ["v1.25.0", "v1.34.0"];
/// Releases that must be possible: any name, any namespace, and the longest name that helm takes.
const RELEASES: [[&str; 2]; 3] = [
    RELEASE,
    ["agents", "team-a"],
    ["as-long-as-the-name-of-a-release-may-be-which-is-53-a", "b"],
];
/// What the chart has to refuse, and what its complaint has to say. A complaint is one sentence.
const REFUSED: [[&str; 2]; 19] = [
    ["imagee.tag=1", "imagee"],
    ["config.publish_every=2s", "publish_every"],
    ["config.failOpenAfter=60", "failOpenAfter"],
    ["config.mode=off", "mode"],
    ["config.services.a.quotas.observed=10m", "quotas"],
    ["config.services.a.quota.observd=10m", "observd"],
    ["config.services.a.quota.pods=3", "got number, want array"],
    ["config.services.a.service=skywalking-oap", "service"],
    ["config.services.a.port=0", "got 0, want 1"],
    ["config.services.a.match=pods", "'service', 'endpoints'"],
    ["config.services.agents=null", "services"],
    ["config.services[0].name=a", "config.services is no list"],
    ["config.services.a.quota.headroom=15%", "has no rule"],
    [
        "config.services.agents.quota.clients=3,config.services.agents.quota.per_backend=4",
        "one rule",
    ],
    [
        "config.services.agents.quota.connections_per_client=2",
        "goes with `clients`",
    ],
    [
        "config.services.a.service=a/b,config.services.a.selector=app=oap",
        "`selector` beside `service`",
    ],
    [
        "privileged=false,bpffs.mountPropagation=Bidirectional",
        "privileged=true",
    ],
    ["probes.liveness.periodSecond=3", "periodSecond"],
    ["privileged=maybe", "privileged"],
];
/// Single settings, and a line that the manifests then have.
const ACCEPTED: [[&str; 2]; 15] = [
    ["config.services.agents.port=11801", "          port: 11801"],
    [
        "config.services.agents.port=grpc",
        "          policy: least-connections",
    ],
    [
        "config.services.agents.quota.per_backend=500",
        "            per_backend: 500",
    ],
    [
        "config.services.agents.quota.clients=300",
        "            headroom: 15%",
    ],
    [
        "config.services.agents.quota.headroom=30%",
        "            observed: 10m",
    ],
    [
        "config.services.agents.quota=null",
        "      publish_every: 2s",
    ],
    ["config.services.als.port=11802", "        - name: als"],
    [
        "config.services.agents.match=endpoints",
        "          match: endpoints",
    ],
    ["config.mode=dry-run", "    mode: dry-run"],
    ["config.mode=on", "    mode: on"],
    ["config.place=off", "      place: off"],
    ["config.place=on", "      place: on"],
    [
        "bpffs.mountPropagation=HostToContainer",
        "              mountPropagation: HostToContainer",
    ],
    ["openshift=true", "kind: SecurityContextConstraints"],
    [
        "updateStrategy.rollingUpdate.maxUnavailable=3",
        "      maxUnavailable: 3",
    ],
];
/// What the notes after an installation have to say, by a setting.
const NOTES: [[&str; 2]; 7] = [
    ["config.mode=on", "agents: port 11800, quotas are by"],
    ["config.mode=dry-run", "quotas would be by"],
    [
        "config.mode=count",
        "connections are counted\n\nNothing is changed",
    ],
    ["config.services.agents.quota=null", "no quota"],
    ["config.mode=on", "place=off\n\nand for everybody by"],
    ["config.mode=dry-run", "(reason dry-run)"],
    ["config.place=off", "config.place is off"],
];

/// Renders the chart into the plain manifests and writes them. `check`: compares them instead, and
/// checks the chart.
///
/// # Errors
/// When helm can't be built or does not take the chart, and for `check` when the manifests are not
/// current.
pub fn manifests(check: bool) -> Result<ExitCode> {
    let helm = Helm {
        program: program()?,
    };
    if check {
        versions()?;
        helm.check()?;
    }
    let rendered = format!("{HEADER}{}", plain(&helm.render_manifests()?));
    let committed = places::workspace().join(MANIFESTS);
    if !check {
        write(&committed, &rendered)?;
        println!("{MANIFESTS} is written");
        return Ok(ExitCode::SUCCESS);
    }
    if std::fs::read_to_string(&committed).unwrap_or_default() != rendered {
        let current = directory()?.join("balancer.yaml");
        write(&current, &rendered)?;
        // It fails because they differ; what it prints is what is wanted of it.
        let _ = command::run(Command::new("diff").arg("-u").args([&committed, &current]));
        bail!("{MANIFESTS} is not what the chart renders to: run `cargo xtask manifests`");
    }
    println!("The chart is in order, and {MANIFESTS} is current.");
    Ok(ExitCode::SUCCESS)
}

/// The real helm, built from `tests/kit/kubernetes/helm/go.mod` the first time. That takes minutes.
///
/// # Errors
/// When there is no Go, or the build fails.
pub fn program() -> Result<PathBuf> {
    let module = places::workspace().join("tests/kit/kubernetes/helm");
    let sums = std::fs::read(module.join("go.sum"))
        .with_context(|| format!("cannot read go.sum in {}", module.display()))?;
    let hash = oci_archive::hex(&Sha256::digest(&sums)[..8]);
    let program = directory()?.join(format!("helm-{hash}"));
    if command::is_executable(&program) {
        return Ok(program);
    }
    eprintln!("building helm from its Go module; it is kept, so this is once");
    let unfinished = program.with_extension("unfinished");
    let go = kubernetes::go().with_context(|| {
        format!(
            "Go is missing, with which helm is built: {}",
            kubernetes::go_by_hand()
        )
    })?;
    let mut build = niced(&go);
    build
        .args([
            "build",
            "-mod=readonly",
            "-trimpath",
            "-ldflags=-s -w",
            "-o",
        ])
        .arg(&unfinished)
        .arg("helm.sh/helm/v3/cmd/helm")
        .current_dir(&module)
        .env("CGO_ENABLED", "0");
    command::run(&mut build).context("helm was not built")?;
    std::fs::rename(&unfinished, &program)
        .with_context(|| format!("cannot rename {}", unfinished.display()))?;
    Ok(program)
}

/// Two minutes of every processor: whoever works on this machine comes first.
fn niced(program: &Path) -> Command {
    command::find("nice").map_or_else(
        || Command::new(program),
        |nice| {
            let mut command = Command::new(nice);
            command.arg(program);
            command
        },
    )
}

fn directory() -> Result<PathBuf> {
    let directory = places::target()?.join("kubernetes");
    std::fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// The chart has the workspace's version.
fn versions() -> Result<()> {
    let chart = places::workspace().join(CHART).join("Chart.yaml");
    let text = std::fs::read_to_string(&chart)
        .with_context(|| format!("cannot read {}", chart.display()))?;
    for line in [
        format!("version: {VERSION}"),
        format!("appVersion: \"{VERSION}\""),
    ] {
        ensure!(
            text.lines().any(|found| found == line),
            "{} has no line `{line}`: that is the workspace's version",
            chart.display()
        );
    }
    Ok(())
}

/// Every set of values of the chart: the default one, and those in its directory `ci`.
fn value_sets() -> Result<Vec<Option<PathBuf>>> {
    let directory = places::workspace().join(CHART).join("ci");
    let entries = std::fs::read_dir(&directory)
        .with_context(|| format!("cannot read {}", directory.display()))?;
    let mut sets = vec![None];
    for entry in entries {
        sets.push(Some(entry.context("cannot read the value sets")?.path()));
    }
    sets.sort();
    Ok(sets)
}

struct Helm {
    program: PathBuf,
}

impl Helm {
    fn check(&self) -> Result<()> {
        for values in value_sets()? {
            for kubernetes in KUBERNETES {
                let mut lint = self.verb("lint", kubernetes);
                lint.args(["--strict", "--quiet", CHART]);
                command::run(with(&mut lint, values.as_deref()))?;
                for release in RELEASES {
                    self.render(release, kubernetes, values.as_deref())?;
                }
            }
        }
        for [setting, words] in REFUSED {
            self.refuses(setting, words)?;
        }
        for [setting, line] in ACCEPTED {
            self.accepts(setting, line)?;
        }
        self.shows_notes()?;
        self.is_a_dependency()
    }

    fn verb(&self, verb: &str, kubernetes: &str) -> Command {
        let mut helm = Command::new(&self.program);
        helm.current_dir(places::workspace())
            .args([verb, "--kube-version", kubernetes]);
        helm
    }

    fn template(&self, [name, namespace]: [&str; 2], kubernetes: &str) -> Command {
        let mut template = self.verb("template", kubernetes);
        template.args([name, CHART, "--namespace", namespace]);
        template
    }

    fn render(
        &self,
        release: [&str; 2],
        kubernetes: &str,
        values: Option<&Path>,
    ) -> Result<String> {
        let mut template = self.template(release, kubernetes);
        stdout(with(&mut template, values))
    }

    fn render_manifests(&self) -> Result<String> {
        let mut template = self.template(RELEASE, KUBERNETES[1]);
        stdout(template.args(["--set", "namespace.create=true"]))
    }

    /// A mistake is an error that says what it is, in one sentence.
    fn refuses(&self, setting: &str, words: &str) -> Result<()> {
        let mut template = self.template(RELEASE, KUBERNETES[1]);
        let Err(complaint) = stdout(template.args(["--set", setting])) else {
            bail!("the chart takes `--set {setting}`, and should not");
        };
        let complaint = format!("{complaint:#}");
        // Behind the command, which has the setting in it.
        let said = complaint.split_once(" failed: ");
        let complaint = said.map_or(&*complaint, |(_, said)| said);
        let lines = complaint.lines().filter(|line| line.contains(words));
        ensure!(
            lines.count() == 1,
            "the chart refuses `--set {setting}`, but does not say `{words}` once: {complaint}"
        );
        let sentences = complaint.lines().filter(|line| line.starts_with("- at "));
        ensure!(
            sentences.count() <= 1,
            "the chart refuses `--set {setting}` in more than a sentence: {complaint}"
        );
        Ok(())
    }

    fn accepts(&self, setting: &str, line: &str) -> Result<()> {
        let rendered = self.render_with(setting)?;
        ensure!(
            rendered.lines().any(|found| found == line),
            "with `--set {setting}` the manifests have no line `{line}`"
        );
        Ok(())
    }

    /// helm shows notes only where it installs: a copy of the chart has them in a manifest.
    fn shows_notes(&self) -> Result<()> {
        let copy = Copied::of_chart("notes")?;
        let shown = "notes: {{ include (print .Template.BasePath \"/NOTES.txt\") . | toJson }}\n";
        write(&copy.0.join("balancer/templates/shown.yaml"), shown)?;
        for [setting, words] in NOTES {
            let mut template = self.verb("template", KUBERNETES[1]);
            template.arg(RELEASE[0]).arg(copy.0.join("balancer"));
            template.args(["--set", setting, "--show-only", "templates/shown.yaml"]);
            let shown = stdout(&mut template)?;
            ensure!(
                shown.contains(&words.replace('\n', "\\n")),
                "with `--set {setting}` the notes don't say `{words}`: {shown}"
            );
        }
        Ok(())
    }

    /// Another chart may have this one in it, and switch it off.
    fn is_a_dependency(&self) -> Result<()> {
        let copy = Copied::of_chart("parent/charts")?;
        let parent = copy.0.with_file_name("");
        let chart = format!(
            "apiVersion: v2\nname: parent\nversion: 1.0.0\ndependencies:\n  \
             - {{name: balancer, version: {VERSION}, condition: balancer.enabled}}\n"
        );
        write(&parent.join("Chart.yaml"), &chart)?;
        for (enabled, expected) in [("true", true), ("false", false)] {
            let mut template = self.verb("template", KUBERNETES[1]);
            template.arg("shop").arg(&parent);
            template.args(["--set", &format!("balancer.enabled={enabled},global.a=b")]);
            let rendered = stdout(&mut template)?;
            ensure!(
                rendered.contains("kind: DaemonSet") == expected,
                "with `balancer.enabled={enabled}` in a parent chart: {rendered}"
            );
        }
        let off = self.render_with("enabled=false")?;
        ensure!(
            !off.contains("kind:"),
            "`enabled=false` leaves something: {off}"
        );
        Ok(())
    }

    fn render_with(&self, setting: &str) -> Result<String> {
        stdout(
            self.template(RELEASE, KUBERNETES[1])
                .args(["--set", setting]),
        )
    }
}

/// A directory below the target directory with a copy of the chart; gone when dropped.
struct Copied(PathBuf);

impl Copied {
    fn of_chart(name: &str) -> Result<Self> {
        let copied = Self(directory()?.join("charts").join(name));
        copied.remove();
        let from = places::workspace().join(CHART);
        copy_directory(&from, &copied.0.join("balancer"))?;
        Ok(copied)
    }

    fn remove(&self) {
        // What is left of it is made anew the next time.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Drop for Copied {
    fn drop(&mut self) {
        self.remove();
    }
}

fn copy_directory(from: &Path, to: &Path) -> Result<()> {
    let copy = || -> std::io::Result<()> {
        std::fs::create_dir_all(to)?;
        for entry in std::fs::read_dir(from)? {
            let entry = entry?;
            let target = to.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                copy_directory(&entry.path(), &target).map_err(std::io::Error::other)?;
            } else {
                std::fs::copy(entry.path(), target)?;
            }
        }
        Ok(())
    };
    copy().with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))
}

fn with<'a>(helm: &'a mut Command, values: Option<&Path>) -> &'a mut Command {
    if let Some(values) = values {
        helm.arg("--values").arg(values);
    }
    helm
}

/// What the command prints; when it fails, an error with its complaint.
fn stdout(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start `{}`", command::line(command)))?;
    ensure!(
        output.status.success(),
        "`{}` failed: {}",
        command::line(command),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    String::from_utf8(output.stdout).context("helm printed something that is not UTF-8")
}

/// Without the labels that say that helm looks after it.
fn plain(rendered: &str) -> String {
    let of_helm = |line: &&str| {
        let line = line.trim_start();
        line.starts_with("helm.sh/chart:") || line == "app.kubernetes.io/managed-by: Helm"
    };
    let lines = rendered.lines().filter(|line| !of_helm(line));
    lines.flat_map(|line| [line, "\n"]).collect()
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::{plain, versions};

    #[test]
    fn plain_manifests_do_not_say_that_helm_looks_after_them() {
        let rendered = "metadata:\n  labels:\n    helm.sh/chart: balancer-0.1.0\n    a: b\n    app.kubernetes.io/managed-by: Helm\n";
        assert_eq!(plain(rendered), "metadata:\n  labels:\n    a: b\n");
    }

    #[test]
    fn the_chart_has_the_version_of_the_workspace() {
        versions().unwrap();
    }
}
