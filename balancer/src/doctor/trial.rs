//! The smallest objects of each kind that the kernel half consists of, made to see whether the kernel takes them.

use std::{io, os::fd::AsFd as _};

use aya_obj::generated::{
    BPF_F_CLONE, BPF_F_MMAPABLE, BPF_F_NO_PREALLOC, bpf_func_id,
    bpf_map_type::{
        self, BPF_MAP_TYPE_ARRAY, BPF_MAP_TYPE_LPM_TRIE, BPF_MAP_TYPE_RINGBUF,
        BPF_MAP_TYPE_SK_STORAGE, BPF_MAP_TYPE_SOCKMAP,
    },
};

use crate::dataplane::Hook;
use crate::sys::bpf::{
    Functions, Instruction, LoadError, MapSpec, MapTypes, PLAIN_FUNCTION, PLAIN_U32, PLAIN_U64,
    ProgramSpec, map_create, plain_types, prog_load,
};

/// A program that does nothing: passes every look-up, acknowledges every event.
pub(super) fn idle(hook: Hook, name: &str) -> Result<std::os::fd::OwnedFd, LoadError> {
    load(hook, name, &[set(0, 1), EXIT], None)
}

/// Why a trial failed.
#[derive(Debug)]
pub(super) enum Refused {
    /// The privilege is missing, so nothing is known.
    Privilege,
    /// The kernel doesn't take it.
    Kernel(String),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM) => Self::Privilege,
            _ => Self::Kernel(error.to_string()),
        }
    }
}

impl From<LoadError> for Refused {
    fn from(error: LoadError) -> Self {
        match error.source.raw_os_error() {
            Some(libc::EPERM) if error.log.is_empty() => Self::Privilege,
            _ => Self::Kernel(error.to_string()),
        }
    }
}

type Outcome = Result<(), Refused>;

const EXIT: Instruction = Instruction {
    code: 0x95,
    registers: 0,
    offset: 0,
    immediate: 0,
};

/// `register = value`.
const fn set(register: u8, value: i32) -> Instruction {
    Instruction {
        code: 0xb7,
        registers: register,
        offset: 0,
        immediate: value,
    }
}

const fn call(helper: bpf_func_id) -> Instruction {
    Instruction {
        code: 0x85,
        registers: 0,
        offset: 0,
        immediate: helper as i32,
    }
}

pub(super) fn program(hook: Hook) -> Outcome {
    idle(hook, "doctor_idle")?;
    Ok(())
}

/// `bpf_loop` with a callback that does nothing.
pub(super) fn bounded_loop() -> Outcome {
    const CALLBACK: u32 = 8;
    let types = plain_types()?;
    let instructions = [
        set(1, 4),
        // r2 = address of the function five instructions behind the second half of this one (BPF_PSEUDO_FUNC).
        Instruction {
            code: 0x18,
            registers: 0x42,
            offset: 0,
            immediate: 6,
        },
        Instruction {
            code: 0,
            registers: 0,
            offset: 0,
            immediate: 0,
        },
        set(3, 0),
        set(4, 0),
        call(bpf_func_id::BPF_FUNC_loop),
        set(0, 1),
        EXIT,
        set(0, 0),
        EXIT,
    ];
    let functions = Functions {
        btf: types.as_fd(),
        starts: &[[0, PLAIN_FUNCTION], [CALLBACK, PLAIN_FUNCTION]],
    };
    load(
        Hook::SkLookup,
        "doctor_loop",
        &instructions,
        Some(functions),
    )?;
    Ok(())
}

/// An atomic addition that returns the old value, as compilers emit it for `fetch_add`.
pub(super) fn atomic_fetch() -> Outcome {
    let instructions = [
        // *(u64 *)(r10 - 8) = 0
        Instruction {
            code: 0x7a,
            registers: 0x0a,
            offset: -8,
            immediate: 0,
        },
        set(1, 1),
        // r1 = atomic_fetch_add((u64 *)(r10 - 8), r1)
        Instruction {
            code: 0xdb,
            registers: 0x1a,
            offset: -8,
            immediate: 1,
        },
        set(0, 1),
        EXIT,
    ];
    load(Hook::SkLookup, "doctor_atomic", &instructions, None)?;
    Ok(())
}

/// Whether a program of that kind may call a helper: the verifier says so before it looks at the arguments.
pub(super) fn helper(hook: Hook, helper: bpf_func_id) -> Outcome {
    let Err(error) = load(
        hook,
        "doctor_helper",
        &[call(helper), set(0, 1), EXIT],
        None,
    ) else {
        return Ok(());
    };
    let unknown = [
        "unknown func",
        "invalid func",
        "cannot use helper",
        "unsupported",
    ];
    if error.log.is_empty() || unknown.iter().any(|words| error.log.contains(words)) {
        Err(error.into())
    } else {
        Ok(())
    }
}

pub(super) fn socket_storage() -> Outcome {
    let types = plain_types()?;
    let spec = MapSpec {
        max_entries: 0,
        flags: BPF_F_NO_PREALLOC | BPF_F_CLONE,
        types: Some(MapTypes {
            btf: types.as_fd(),
            key: PLAIN_U32,
            value: PLAIN_U64,
        }),
        ..named(BPF_MAP_TYPE_SK_STORAGE)
    };
    map(&spec)
}

pub(super) fn socket_map() -> Outcome {
    map(&named(BPF_MAP_TYPE_SOCKMAP))
}

pub(super) fn ring_buffer() -> Outcome {
    // A multiple of the page size, whatever that is.
    map(&MapSpec {
        key_size: 0,
        value_size: 0,
        max_entries: 64 * 1024,
        ..named(BPF_MAP_TYPE_RINGBUF)
    })
}

pub(super) fn prefix_tree() -> Outcome {
    map(&MapSpec {
        key_size: 8,
        flags: BPF_F_NO_PREALLOC,
        ..named(BPF_MAP_TYPE_LPM_TRIE)
    })
}

pub(super) fn shared_array() -> Outcome {
    map(&MapSpec {
        flags: BPF_F_MMAPABLE,
        ..named(BPF_MAP_TYPE_ARRAY)
    })
}

fn named(kind: bpf_map_type) -> MapSpec<'static> {
    MapSpec::new(kind, "doctor")
}

fn map(spec: &MapSpec<'_>) -> Outcome {
    map_create(spec)?;
    Ok(())
}

fn load(
    hook: Hook,
    name: &str,
    instructions: &[Instruction],
    functions: Option<Functions<'_>>,
) -> Result<std::os::fd::OwnedFd, LoadError> {
    prog_load(&ProgramSpec {
        kind: hook.program_type(),
        attach_type: Some(hook.attach_type()),
        name,
        instructions,
        functions,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bpf_func_id::{BPF_FUNC_sk_assign, BPF_FUNC_sock_map_update, BPF_FUNC_unspec};

    #[test]
    fn a_helper_is_told_by_the_kind_of_program() {
        helper(Hook::SkLookup, BPF_FUNC_sk_assign).expect("sk_lookup may assign");
        helper(Hook::SockOps, BPF_FUNC_sock_map_update).expect("sock_ops may fill a SOCKMAP");
        for (hook, wrong) in [
            (Hook::SockOps, BPF_FUNC_sk_assign),
            (Hook::SkLookup, BPF_FUNC_sock_map_update),
            (Hook::SockOps, BPF_FUNC_unspec),
        ] {
            let Err(Refused::Kernel(why)) = helper(hook, wrong) else {
                panic!("{hook:?} has no {wrong:?}")
            };
            assert!(why.contains("Invalid argument"), "{why}");
        }
    }

    #[test]
    fn what_the_kernel_refuses_is_not_taken_for_a_missing_privilege() {
        let wrong = map(&MapSpec {
            key_size: 3,
            ..named(BPF_MAP_TYPE_ARRAY)
        });
        assert!(matches!(wrong, Err(Refused::Kernel(_))), "{wrong:?}");
    }
}
