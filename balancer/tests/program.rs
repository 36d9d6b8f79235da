//! The program as a shell sees it: exit codes, which stream says what, and readers that go away.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
};

/// The program, pointed at a directory in which there is no balancer.
fn balancer(directory: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_balancer"));
    command
        .env_remove("BALANCER_LOG")
        .env("BALANCER_STATE_DIR", directory.join("state"))
        .env("BALANCER_ADMIN_SOCKET", directory.join("admin.sock"));
    command
}

fn run(directory: &Path, arguments: &[&str]) -> Output {
    balancer(directory)
        .args(arguments)
        .output()
        .expect("the program starts")
}

#[track_caller]
fn assert_fails(output: &Output, code: i32, words: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    assert!(
        said.starts_with("error: ") && said.contains(words),
        "{said}"
    );
    assert_eq!(said.matches("error: ").count(), 1, "one error: {said}");
    assert!(output.stdout.is_empty(), "an error is not output");
}

#[test]
fn exit_codes() {
    let directory = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| run(directory.path(), arguments);
    for arguments in [
        &["--help"][..],
        &["--version"],
        &["help", "run"],
        &["quota", "set", "--help"],
        &["unload"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(
            !output.stdout.is_empty() && output.stderr.is_empty(),
            "{arguments:?}"
        );
    }
    for arguments in [
        &["status"][..],
        &["status", "-o", "json"],
        &["quota", "show"],
        &["explain", "--from", "::1", "--to", "1"],
    ] {
        assert_fails(&run(arguments), 1, "no balancer is loaded at");
    }
    assert_fails(
        &run(&["quota", "set", "agents", "5"]),
        1,
        "no daemon answers at",
    );
    assert!(!directory.path().join("state").exists());
    assert_fails(&run(&["frobnicate"]), 2, "unrecognized subcommand");
    let misspelt = run(&["unlod"]);
    assert_fails(&misspelt, 2, "unrecognized subcommand");
    assert!(!String::from_utf8_lossy(&misspelt.stderr).contains("'unload'"));
    assert_fails(&run(&["reload"]), 1, "no daemon answers at");
    assert_fails(&run(&["run"]), 2, "--config <FILE>");
    assert_fails(
        &run(&["explain", "--from", "oap", "--to", "1"]),
        2,
        "write an address such as",
    );
    assert_fails(
        &run(&["explain", "--from", "::1", "--to", "10.0.0.9:1"]),
        2,
        "::1 and 10.0.0.9:1 are of two address families",
    );
}

#[test]
fn a_bad_configuration_is_one_line_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("bad.yaml");
    fs::write(&file, "services:\n  - name: agents\n    port: 70000\n").unwrap();
    let output = run(
        directory.path(),
        &["run", "--config", file.to_str().unwrap()],
    );
    let expected = format!(
        "{}:3:11: `70000` is not a TCP port; write a number from 1 to 65535\n",
        file.display()
    );
    assert_fails(&output, 1, &expected);
    assert_eq!(
        fs::read_dir(directory.path()).unwrap().count(),
        1,
        "nothing but the file"
    );
}

/// What steers a terminal, and what is shown instead.
const ESCAPE: (&str, &str) = ("\u{1b}[2J", "\\u001b[2J");

#[test]
fn a_path_does_not_reach_the_terminal_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let path = format!("/no/such{}", ESCAPE.0);
    for arguments in [
        &["doctor", "--config", &path][..],
        &["run", "--config", &path],
        &["status", "--state-dir", &path],
        &["reload", "--admin-socket", &path],
    ] {
        let output = run(directory.path(), arguments);
        assert_fails(&output, 1, ESCAPE.1);
        assert!(!output.stderr.contains(&0x1b), "{output:?}");
    }
}

/// Anybody who may write a node report, and any pod's name, is shown by `status --cluster`.
#[test]
fn what_a_cluster_tells_does_not_reach_the_terminal_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    let daemon = UnixListener::bind(directory.path().join("admin.sock")).unwrap();
    let problem = "the ConfigMap \\u001b[2J is bad";
    let answer = format!(
        "{{\"result\":\"cluster\",\"cluster\":{{\"schema\":1,\"node\":\"n\",\"complete\":true,\
         \"silent_seconds\":0,\"problems\":[\"{problem}\"],\"groups\":[],\
         \"placing\":{{\"on\":false,\"daemons\":null,\"services\":[]}}}}}}\n"
    );
    let serving = thread::spawn(move || {
        for _ in 0..2 {
            let (mut client, _) = daemon.accept().unwrap();
            BufReader::new(&client)
                .read_line(&mut String::new())
                .unwrap();
            client.write_all(answer.as_bytes()).unwrap();
        }
    });
    for arguments in [
        &["status", "--cluster"][..],
        &["status", "--cluster", "-o", "json"],
    ] {
        let output = run(directory.path(), arguments);
        let said = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && said.contains(ESCAPE.1), "{said}");
        assert!(!said.contains('\u{1b}'), "{said:?}");
    }
    serving.join().unwrap();
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    for arguments in [&["completions", "bash"][..], &["unload"], &["doctor"]] {
        let mut child = balancer(directory.path())
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let mut said = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut said)
            .unwrap();
        let status = child.wait().unwrap();
        assert!(said.is_empty(), "{arguments:?}: {said}");
        // `doctor` also tells by its code what it has found.
        assert!(
            matches!(status.code(), Some(0 | 1)),
            "{arguments:?}: {status}"
        );
        assert!(
            status.code() == Some(0) || arguments == ["doctor"],
            "{arguments:?}: {status}"
        );
    }
}

#[test]
fn output_that_is_lost_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let output = balancer(directory.path())
        .args(["completions", "zsh"])
        .stdout(full)
        .output()
        .unwrap();
    assert_fails(
        &output,
        1,
        "can't write to standard output: No space left on device",
    );
}

#[test]
fn every_shell_gets_its_completions() {
    let directory = tempfile::tempdir().unwrap();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let output = run(directory.path(), &["completions", shell]);
        let script = String::from_utf8(output.stdout).unwrap();
        for word in ["status", "quota", "admin-socket", "on-exit"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let script = directory.path().join("completions.bash");
    fs::write(
        &script,
        run(directory.path(), &["completions", "bash"]).stdout,
    )
    .unwrap();
    let checked = Command::new("bash")
        .arg("-n")
        .arg(&script)
        .status()
        .unwrap();
    assert!(checked.success(), "bash reads its script");
}
